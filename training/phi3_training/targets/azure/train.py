"""The stages `base`, `finetune` and `evaluate` on Azure: one interface over both routes.

Reads the prepared chats; writes <run>/azure/ and brings the job's small files back to where a run
on this machine has them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...console import ProgressCallback
from ...errors import StageError
from ...recipe import Recipe
from ...run import Run, fingerprint, write_atomically
from . import job_route, pipeline_route
from .clients import Clients
from .follow import status_of
from .in_job import MANIFESTS, SMALL
from .jobs import EVALUATE, TRAIN, carry_out
from .outputs import fetch, place_of_output
from .routes import Choice, choose
from .staging import stage

Manifest = dict[str, Any]


def prepare_base(
    clients: Clients, recipe: Recipe, run: Run, progress: ProgressCallback
) -> Manifest:
    """Which model is tuned, and by which route; nothing is fetched here, the job does that."""
    del run
    progress(0, 0, "choosing the route")
    choice = choose(clients, recipe)
    name = recipe.model.name_or_path
    model = "a tiny Phi-3, made in the job" if recipe.model.is_tiny else name
    if choice.foundation is not None:
        model = f"{choice.foundation.name} version {choice.foundation.version} of the catalogue"
    return {
        "target": "azure",
        "path": ".",
        "made": "in the job",
        "route": choice.route,
        "summary": f"{model}; route {choice.route}",
        "settings": {"name_or_path": name, "revision": recipe.model.revision},
        "choices": [f"route {choice.route}: {choice.reason}"],
    }


def finetune(clients: Clients, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
    """Fine-tune in a job and wait for it; the manifest `model`."""
    progress(0, 0, "choosing the route")
    choice = choose(clients, recipe)
    if choice.route == "pipeline":
        return _pipeline(clients, recipe, run, choice, progress)
    return _job(clients, recipe, run, choice, progress)


def _job(
    clients: Clients, recipe: Recipe, run: Run, choice: Choice, progress: ProgressCallback
) -> Manifest:
    machines = job_route.machines_of(clients, recipe)
    data = stage(recipe, run, machines.all_processes).learnt
    job = carry_out(
        clients,
        run,
        TRAIN,
        fingerprint(["job", job_route.inputs_digest(recipe), data]),
        "job",
        lambda name: job_route.train_job(clients, recipe, run, name, machines),
        progress,
        limit=_limit(recipe),
    )
    made = _bring_back(clients, run, job, TRAIN, progress)
    model = made.get("model") or {}
    base = made.get("base") or {}
    size = recipe.azure.compute.size
    many = f", {machines.all_processes} processes" if machines.all_processes > 1 else ""
    return {
        **{key: value for key, value in model.items() if key not in _STAMPS},
        **_common(job, choice, job_route.MODEL),
        "summary": f"job {job.name}: {model.get('summary', 'completed')}",
        "base_revision": base.get("revision"),
        "settings": {**(model.get("settings") or {}), "route": "job"},
        "choices": [
            f"route job: {choice.reason}",
            f"{machines.instances} x {size}{many}",
            *model.get("choices", []),
        ],
    }


def _pipeline(
    clients: Clients, recipe: Recipe, run: Run, choice: Choice, progress: ProgressCallback
) -> Manifest:
    foundation = choice.foundation
    assert foundation is not None  # noqa: S101 - `choose` gives one with every pipeline
    prepared = pipeline_route.prepare(clients, recipe, foundation)
    data = stage(recipe, run).learnt
    digest: list[Any] = [foundation.id, prepared.parameters.values, recipe.azure.compute.size]
    digest += [str(prepared.component.version), recipe.azure.train.instance_count]
    job = carry_out(
        clients,
        run,
        TRAIN,
        fingerprint(["pipeline", digest, data]),
        "pipeline",
        lambda name: pipeline_route.pipeline_job(recipe, run, name, foundation, prepared),
        progress,
        limit=_limit(recipe),
    )
    return {
        **_common(job, choice, pipeline_route.OUTPUT),
        "summary": f"pipeline {job.name}: {prepared.display_name}",
        "display_name": prepared.display_name,
        "base_revision": foundation.version,
        "adapter": None,
        "settings": {**prepared.parameters.values, "route": "pipeline"},
        "choices": [
            f"route pipeline: {choice.reason}",
            f"sizes for fine-tuning: {foundation.allowed_from}",
            f"{prepared.gpus} GPUs in each {recipe.azure.compute.size}",
            *prepared.parameters.lines(),
        ],
    }


_STAMPS = frozenset(("version", "stage", "seconds", "fingerprint", "done_id", "path"))


def _common(job: Any, choice: Choice, output: str) -> Manifest:
    foundation = choice.foundation
    name = str(job.name)
    return {
        "target": "azure",
        "route": choice.route,
        "job": name,
        "path": "azure/train",
        "output": output,
        "model_output": f"azureml://jobs/{name}/outputs/{output}",
        "output_path": place_of_output(job, output),
        "model_type": "mlflow_model",
        "studio_url": getattr(job, "studio_url", None),
        "foundation_model": None
        if foundation is None
        else {"name": foundation.name, "version": foundation.version, "id": foundation.id},
    }


def evaluate(clients: Clients, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
    """The figures of both models: those that the training job measured, else from a job for it."""
    model = run.require("model", "phi3 train --on azure")
    asked = stage(recipe, run).asked
    measured = _measured(run, model, asked)
    if measured is not None:
        return measured
    job = carry_out(
        clients,
        run,
        EVALUATE,
        fingerprint(["evaluate", model["job"], asked]),
        "job",
        lambda name: job_route.evaluate_job(
            clients, recipe, run, name, _tuned(model), _base_model(recipe, model)
        ),
        progress,
        limit=_limit(recipe),
    )
    made = _bring_back(clients, run, job, EVALUATE, progress)
    if "metrics" not in made:
        raise _no_manifest(job, "metrics")
    return made["metrics"]


def _metrics(content: Manifest, job: str) -> Manifest:
    kept = {key: value for key, value in content.items() if key not in _STAMPS}
    return {**kept, "target": "azure", "job": job}


def _measured(run: Run, model: Manifest, asked: str) -> Manifest | None:
    """What came back with the training job, if it was asked the same and is still there."""
    kept = run.path / "azure" / TRAIN
    try:
        content: Manifest = json.loads((kept / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = content.get("job") == model["job"] and content.get("asked") == asked
    if not same or not (run.path / content["rows"]).is_file():
        return None
    if (run.manifest("metrics") or {}).get("job") not in (None, model["job"]):
        return None  # the rows in the run folder are those of another job
    return content


def _tuned(model: Manifest) -> Any:
    from azure.ai.ml import Input

    # By its place in the store: a job's output is a source for models, not for inputs.
    return Input(type="mlflow_model", path=model["output_path"])


def _base_model(recipe: Recipe, model: Manifest) -> Any | None:
    """The catalogue's model, or a folder of weights; else the job finds the base by its name."""
    from azure.ai.ml import Input

    foundation = model.get("foundation_model")
    if foundation:
        return Input(type="mlflow_model", path=foundation["id"])
    folder = Path(recipe.model.name_or_path).expanduser()
    if not recipe.model.is_tiny and folder.is_dir():
        return Input(type="uri_folder", path=str(folder.resolve()))
    return None


def _bring_back(
    clients: Clients, run: Run, job: Any, purpose: str, progress: ProgressCallback
) -> dict[str, Manifest]:
    """Fetch the job's small files; the manifests that it wrote."""
    kept = run.file("azure", purpose, ".keep").parent
    fetched = run.file("azure", f"{purpose}-files", ".keep").parent
    fetch(clients, job, job_route.RUN, fetched, progress)
    made = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((fetched / MANIFESTS).glob("*.json"))
    }
    if "metrics" in made:
        made["metrics"] = _metrics(made["metrics"], str(job.name))
    for name, content in made.items():
        write_atomically(kept / f"{name}.json", json.dumps(content, indent=2) + "\n")
    _settle(fetched, run)
    return made


def _settle(fetched: Path, run: Run) -> None:
    """Move the files to where the later stages look for them."""
    for name in SMALL:
        source, target = fetched / name, run.path / name
        if not source.exists():
            continue
        _remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    _remove(fetched)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _no_manifest(job: Any, name: str) -> StageError:
    return StageError(
        f"The job {job.name} ({status_of(job)}) brought no {name}.json back; look at its log in "
        "the studio, then try again: phi3 up --on azure --again evaluate"
    )


def _limit(recipe: Recipe) -> float:
    """The job ends itself at its own limit; waiting for a machine comes on top."""
    return recipe.azure.train.timeout_minutes * 60.0 + 4 * 3600.0
