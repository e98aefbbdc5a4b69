"""The stage `register`: the job's MLflow model as a version in the workspace, with its tags.

Reads the manifests `dataset`, `base`, `model`, `metrics`. A version that this job's model already
has is found by its tag, so that none is registered twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...errors import StageError
from ...recipe import Recipe
from ...run import Run, fingerprint, sha256_of
from ..base import Manifest
from .clients import Clients
from .failures import explained, message_of
from .place import Made, note
from .waiting import absent

log = logging.getLogger(__name__)

JOB_TAG = "phi3_job"
# A tag's value may have 256 characters.
_LONGEST = 256


def register(clients: Clients, recipe: Recipe, run: Run) -> Manifest:
    """Register the model that the run's job made; the manifest `registration`."""
    model = run.require("model", "phi3 train --on azure")
    tags = tags_of(recipe, run, model)
    known = _registered(clients, recipe.name, model["job"])
    if known is not None:
        return _manifest(known, "the job's model was registered before", tags)
    version = _next_version(clients, recipe.name)
    note(run, Made("model", f"{recipe.name}:{version}"))
    made, source = _make(clients, recipe.name, version, model, tags)
    return _manifest(made, f"from {source}", tags)


def tags_of(recipe: Recipe, run: Run, model: Manifest) -> dict[str, str]:
    """What a registered model says of itself: data, recipe, base and figures."""
    dataset = run.require("dataset", "phi3 data prepare")
    hashes = sorted(str(part.get("sha256")) for part in dataset["outputs"].values())
    path = run.path / "recipe.yaml"
    base = model.get("foundation_model") or {}
    tags = {
        JOB_TAG: model["job"],
        "phi3_route": model.get("route"),
        "phi3_run": run.name,
        "data_hash": fingerprint(hashes),
        "recipe": recipe.name,
        "recipe_hash": sha256_of(path)[:16] if path.is_file() else None,
        "base_model": base.get("name") or recipe.model.name_or_path,
        "base_revision": model.get("base_revision") or base.get("version"),
        **_figures(run),
    }
    return {name: str(value)[:_LONGEST] for name, value in tags.items() if value is not None}


def _figures(run: Run) -> dict[str, str]:
    """The tuned model's figures on the held-out chats, and the gate's word."""
    metrics, gate = run.manifest("metrics") or {}, run.manifest("gate") or {}
    found = {
        f"validation_{name}": f"{value:.6g}"
        for name, value in (metrics.get("after") or {}).get("validation", {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return {**found, **({"gate_passed": str(gate["passed"])} if "passed" in gate else {})}


def _registered(clients: Clients, name: str, job: str) -> Any | None:
    return next((m for m in _versions(clients, name) if (m.tags or {}).get(JOB_TAG) == job), None)


def _versions(clients: Clients, name: str) -> Iterator[Any]:
    """The versions of a model, newest first; none where the name is new."""
    from azure.core.exceptions import HttpResponseError

    with explained(f"Listing the versions of the model {name}"):
        try:
            yield from clients.ml.models.list(name=name)
        except HttpResponseError as error:
            if not absent(error):
                raise


def _next_version(clients: Clients, name: str) -> str:
    numbers = [int(m.version) for m in _versions(clients, name) if str(m.version).isdecimal()]
    return str(max(numbers, default=0) + 1)


def _make(
    clients: Clients, name: str, version: str, model: Manifest, tags: dict[str, str]
) -> tuple[Any, str]:
    """Register from the first of the job's places that Azure takes."""
    from azure.ai.ml.entities import Model
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError, HttpResponseError

    refused = []
    for source in _sources(clients, model):
        entity = Model(
            name=name,
            version=version,
            path=source,
            type=model.get("model_type") or "mlflow_model",
            tags=tags,
            description=f"Tuned with phi3-promptflow by the job {model['job']}",
        )
        try:
            return clients.ml.models.create_or_update(entity), source
        except (HttpResponseError, MlException) as error:
            # 4xx: this place is not taken (the output is unknown, or the path); others may be.
            status = getattr(error, "status_code", 400) or 400
            known = _registered(clients, name, model["job"]) if status == 409 else None
            if known is not None:  # it was made, and the answer was lost
                return known, source
            if status in (401, 403, 408, 409, 429) or status >= 500:
                with explained(f"Registering the model {name}"):
                    raise
            refused.append(f"  {source}: {message_of(error)}")
            log.info("the model is not taken from %s", source)
        except AzureError:
            with explained(f"Registering the model {name}"):
                raise
    with TemporaryDirectory(prefix="phi3-model-") as folder:
        path = _downloaded(clients, model, Path(folder), refused)
        with explained(f"Registering the model {name} from its download"):
            entity = Model(name=name, version=version, path=path, type="mlflow_model", tags=tags)
            return clients.ml.models.create_or_update(entity), "a download of the job's output"


def _sources(clients: Clients, model: Manifest) -> Iterator[str]:
    """Where the model may be: the job's output, the path it is said to have, a step's output."""
    job, output = model["job"], model["output"]
    named = model.get("model_output") or f"azureml://jobs/{job}/outputs/{output}"
    yield named
    with explained(f"Reading the job {job}"):
        outputs = getattr(clients.ml.jobs.get(job), "outputs", None) or {}
        path = getattr(outputs.get(output), "path", None)
    if path:
        yield str(path)
    if model.get("route") == "pipeline":
        with explained(f"Listing the steps of the job {job}"):
            children = [str(child.name) for child in clients.ml.jobs.list(parent_job_name=job)]
        for child in children:
            yield f"azureml://jobs/{child}/outputs/mlflow_model_folder"


def _downloaded(clients: Clients, model: Manifest, folder: Path, refused: list[str]) -> Path:
    """The job's output on this machine, the last way. StageError where it is no model."""
    with explained(f"Downloading the model of the job {model['job']}"):
        clients.ml.jobs.download(
            model["job"], download_path=str(folder), output_name=model["output"]
        )
    found = sorted(folder.rglob("MLmodel"), key=lambda path: len(path.parts))
    if not found:
        tried = "\n".join(refused)
        raise StageError(
            f"The job {model['job']} holds no MLflow model that Azure takes. Tried:\n{tried}\n"
            "Mend: look at the job's outputs in the studio; train again with: "
            "phi3 up --on azure --again finetune"
        )
    return found[0].parent


def _manifest(made: Any, how: str, tags: dict[str, str]) -> Manifest:
    return {
        "target": "azure",
        "model": str(made.name),
        "model_version": str(made.version),
        "model_id": made.id,
        "tags": json.loads(json.dumps(tags)),
        "choices": [how],
    }
