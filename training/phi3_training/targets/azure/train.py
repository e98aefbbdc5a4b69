"""The stages `base`, `finetune` and `evaluate` on Azure: one interface over both routes.

Chooses the route and says why. Reads the prepared chats; writes <run>/azure/ and brings the job's
small files back to where a run on this machine has them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...errors import StageError
from ...manifests import BaseManifest, Foundation, MetricsManifest, ModelManifest
from ...progress import Progress, note
from ...recipe import Recipe
from ...run import Run, fingerprint, write_atomically
from .clients import Clients
from .command_job import (
    MODEL_OUTPUT,
    RUN_OUTPUT,
    evaluate_job,
    local_base,
    machines_of,
    send,
    settings_digest,
    stage_inputs,
    train_job,
)
from .in_job import MANIFESTS, SMALL_FILES
from .jobs import (
    EVALUATE,
    TRAIN,
    Purpose,
    run_job,
    status_of,
)
from .pipeline_job import (
    ARCHIVED,
    PIPELINE_OUTPUT,
    FoundationModel,
    find_foundation_model,
    pipeline_job,
    prepare_pipeline,
    send_chats,
)
from .place import AZURE
from .sizes import refuse_outside, refuse_retired
from .storage import fetch_output, path_of_output

if TYPE_CHECKING:
    from azure.ai.ml import Input
    from azure.ai.ml.entities import Job

log = logging.getLogger(__name__)
Route = Literal["pipeline", "job"]


@dataclass(frozen=True)
class RouteChoice:
    """The route, its reason, and the catalogue's model (route `pipeline` only)."""

    route: Route
    reason: str
    foundation: FoundationModel | None = None


def choose_route(clients: Clients, recipe: Recipe) -> RouteChoice:
    """The route. StageError for a pipeline that the recipe asks for and that is not possible.

    `auto` takes the pipeline where the catalogue still keeps the model and allows the size.
    """
    train, size = recipe.azure.train, recipe.azure.compute.size
    # First, whatever the route: Azure would refuse the size only when the cluster is created.
    refuse_retired(size, "azure.compute.size")
    if train.route == "job":
        return RouteChoice("job", "set by azure.train.route")
    is_asked_for = train.route == "pipeline"
    model = recipe.model.name_or_path
    name = train.foundation_model.name
    if name is None and not recipe.model.is_tiny and local_base(recipe) is None:
        name = model.rsplit("/", 1)[-1]  # a Hugging Face id without its owner
    if name is None:
        reason = f"{model} is not in Azure's catalogue"
        if is_asked_for:
            raise StageError(
                f"azure.train.route=pipeline tunes a catalogue model, and {reason}. Name one "
                "(azure.train.foundation_model.name=Phi-4-mini-instruct), or use "
                "azure.train.route=job"
            )
        return RouteChoice("job", reason)
    if not is_asked_for:
        settings, data = recipe.finetune, recipe.data
        only_ours = [
            text
            for is_set, text in (
                (settings.method in ("qlora", "dora"), f"finetune.method={settings.method}"),
                (settings.packing, "finetune.packing"),
                (settings.loss is not None, f"finetune.loss={settings.loss}"),
                (bool(data.replay), "data.replay"),
                (data.casual_copies, "data.casual_copies"),
                (data.rewordings > 0, "data.rewordings"),
                (settings.max_steps is not None, "finetune.max_steps"),
                (settings.adapter_weight < 1.0, "finetune.adapter_weight"),
                (settings.neftune_noise_alpha is not None, "finetune.neftune_noise_alpha"),
                (recipe.model.revision is not None, "model.revision"),
            )
            if is_set
        ]
        if only_ours:
            reason = f"the catalogue's pipeline does not support {', '.join(only_ours)}"
            return RouteChoice("job", reason)
        if name.lower() in ARCHIVED:
            return RouteChoice("job", f"{name} is {ARCHIVED[name.lower()]}")

    # Up to here the recipe alone has decided, and nothing was sent.
    foundation = find_foundation_model(clients, train.foundation_model, name)
    if foundation is None:
        reason = f"the registry {train.foundation_model.registry_name} has no model {name}"
        if train.foundation_model.version != "latest":
            reason += f" version {train.foundation_model.version}"
        if is_asked_for:
            raise StageError(
                f"azure.train.route=pipeline is not possible: {reason}. Set another "
                "azure.train.foundation_model, or use azure.train.route=job"
            )
        return RouteChoice("job", reason)
    if is_asked_for:
        refuse_outside(foundation.allowed, size, "azure.compute.size", foundation.name)
        warning = f", although it is {foundation.archived}" if foundation.archived else ""
        return RouteChoice("pipeline", f"set by azure.train.route{warning}", foundation)
    if foundation.archived:
        return RouteChoice("job", f"{foundation.name} is {foundation.archived}")
    try:
        refuse_outside(foundation.allowed, size, "azure.compute.size", foundation.name)
    except StageError as error:
        return RouteChoice("job", f"the catalogue's pipeline is not possible: {error}")
    return RouteChoice(
        "pipeline",
        f"{foundation.name} version {foundation.version} is in the catalogue and supports {size}",
        foundation,
    )


def prepare_base(clients: Clients, recipe: Recipe, run: Run, progress: Progress) -> BaseManifest:
    """Which model is tuned, and by which route; nothing is downloaded here, the job does that."""
    del run
    note(progress, "choosing the route")
    choice = choose_route(clients, recipe)
    name = recipe.model.name_or_path
    model = "a tiny Phi-3, trained in the job" if recipe.model.is_tiny else name
    if choice.foundation is not None:
        model = f"{choice.foundation.name} version {choice.foundation.version} of the catalogue"
    return BaseManifest(
        target=AZURE,
        path=".",
        made="in the job",
        route=choice.route,
        summary=f"{model}; route {choice.route}",
        settings={"name_or_path": name, "revision": recipe.model.revision},
        choices=[f"route {choice.route}: {choice.reason}"],
    )


def send_ahead(clients: Clients, recipe: Recipe, run: Run, progress: Progress) -> None:
    """Upload what the training job will read, while there is no cluster yet to run it."""
    try:
        if choose_route(clients, recipe).foundation is not None:
            send_chats(clients, run, progress)
        else:
            processes = machines_of(clients, recipe).all_processes
            send(clients, recipe, run, processes, progress)
    except StageError as error:
        # The submission sends what is missing, or ends with the reason: a workspace that was made
        # a moment ago may have no datastore yet.
        log.info("not uploaded ahead: %s", error)


Work = Callable[[Progress], object]  # what is done while a job is at work


def finetune(
    clients: Clients,
    recipe: Recipe,
    run: Run,
    progress: Progress,
    in_parallel: Work | None = None,
) -> ModelManifest:
    """Fine-tune in a job and wait for it, with `in_parallel` at the same time."""
    note(progress, "choosing the route")
    choice = choose_route(clients, recipe)
    if choice.foundation is not None:
        return _by_pipeline(clients, recipe, run, choice, choice.foundation, progress, in_parallel)
    return _by_command_job(clients, recipe, run, choice, progress, in_parallel)


def _by_command_job(
    clients: Clients,
    recipe: Recipe,
    run: Run,
    choice: RouteChoice,
    progress: Progress,
    in_parallel: Work | None,
) -> ModelManifest:
    machines = machines_of(clients, recipe)
    processes = machines.all_processes
    training_data = stage_inputs(recipe, run, processes).training_data

    def build(name: str) -> Job:
        sent = send(clients, recipe, run, processes, progress)
        return train_job(clients, recipe, run, name, machines, sent)

    job = run_job(
        clients,
        run,
        TRAIN,
        fingerprint(["job", settings_digest(recipe), training_data]),
        "job",
        build,
        progress,
        limit=_limit(recipe),
        in_parallel=in_parallel,
    )
    brought = _bring_back(clients, run, job, TRAIN, progress)
    model, base = brought.read(ModelManifest), brought.read(BaseManifest)
    many = f", {processes} processes" if processes > 1 else ""
    said = _of_job(job, choice, MODEL_OUTPUT)
    if model is not None:  # what the trainer wrote of itself
        said = model.model_copy(update=said.model_dump(exclude_unset=True))
    return said.model_copy(
        update={
            "foundation_model": None,
            "summary": f"job {job.name}: {said.summary or 'completed'}",
            "base_revision": None if base is None else base.revision,
            "settings": {**said.settings, "route": "job"},
            "choices": [
                f"route job: {choice.reason}",
                f"{machines.instances} x {recipe.azure.compute.size}{many}",
                *said.choices,
            ],
        }
    )


def _by_pipeline(
    clients: Clients,
    recipe: Recipe,
    run: Run,
    choice: RouteChoice,
    foundation: FoundationModel,
    progress: Progress,
    in_parallel: Work | None,
) -> ModelManifest:
    prepared = prepare_pipeline(clients, recipe, foundation)
    training_data = stage_inputs(recipe, run).training_data
    size = recipe.azure.compute.size
    # With the component's version: `latest` may have moved on since the job was submitted.
    digest: list[object] = [foundation.id, prepared.parameters.values, size]
    digest += [str(prepared.component.version), recipe.azure.train.instance_count]
    job = run_job(
        clients,
        run,
        TRAIN,
        fingerprint(["pipeline", digest, training_data]),
        "pipeline",
        lambda name: pipeline_job(
            recipe, run, name, foundation, prepared, send_chats(clients, run, progress)
        ),
        progress,
        limit=_limit(recipe),
        in_parallel=in_parallel,
    )
    return _of_job(job, choice, PIPELINE_OUTPUT).model_copy(
        update={
            "foundation_model": Foundation(
                name=foundation.name, version=foundation.version, id=foundation.id
            ),
            "summary": f"pipeline {job.name}: {prepared.display_name}",
            "display_name": prepared.display_name,
            "base_revision": foundation.version,
            "adapter": None,
            "settings": {**prepared.parameters.values, "route": "pipeline"},
            "choices": [
                f"route pipeline: {choice.reason}",
                f"sizes for fine-tuning: {foundation.allowed_from}",
                f"{prepared.gpus} GPUs in each {size}",
                *prepared.parameters.lines(),
            ],
        }
    )


def _of_job(job: Job, choice: RouteChoice, output: str) -> ModelManifest:
    """What the manifest says of the job, on both routes."""
    name = str(job.name)
    return ModelManifest(
        target=AZURE,
        route=choice.route,
        job=name,
        path="azure/train",
        output=output,
        model_output=f"azureml://jobs/{name}/outputs/{output}",
        output_path=path_of_output(job, output),
        model_type="mlflow_model",
        studio_url=getattr(job, "studio_url", None),
    )


def evaluate(clients: Clients, recipe: Recipe, run: Run, progress: Progress) -> MetricsManifest:
    """The figures of both models: those that the training job measured, else from a second job."""
    from azure.ai.ml import Input

    # Our trainer's job measures as well. The catalogue's pipeline does not: version 0.0.82 still
    # takes compute_model_evaluation, and has no evaluation step any more.
    model = run.require(ModelManifest)
    questions = stage_inputs(recipe, run).questions
    try:
        measured = _brought(run, TRAIN).read(MetricsManifest)
    except StageError:  # written by another version: a second job evaluates again
        measured = None
    # Only what answers the same questions about the same model, and still has its rows.
    if (
        measured is not None
        and (measured.job, measured.asked) == (model.job, questions)
        and (run.path / measured.rows).is_file()
    ):
        return measured
    # By its path in the store: azureml://jobs/… is a source for models, not for a job's inputs.
    tuned = Input(type="mlflow_model", path=model.output_path)
    foundation = model.foundation_model

    def build(name: str) -> Job:
        sent = send(clients, recipe, run, 1, progress)
        base: Input | None = None  # the job finds the base by its Hugging Face name
        if foundation:
            base = Input(type="mlflow_model", path=foundation.id)
        elif sent.base is not None:
            base = Input(type="uri_folder", path=sent.base)
        return evaluate_job(clients, recipe, run, name, tuned, base, sent)

    job = run_job(
        clients,
        run,
        EVALUATE,
        fingerprint(["evaluate", model.job, questions]),
        "job",
        build,
        progress,
        limit=_limit(recipe),
    )
    metrics = _bring_back(clients, run, job, EVALUATE, progress).read(MetricsManifest)
    if metrics is None:
        raise StageError(
            f"The job {job.name} ({status_of(job)}) wrote no metrics.json; check its log in the "
            f"studio, then try again: phi3 up --on azure --again evaluate"
        )
    return metrics


def _brought(run: Run, purpose: Purpose) -> Run:
    """The folder of what a job wrote of itself; its manifests are read as those of a run."""
    return Run(run.path / "azure" / purpose)


def _bring_back(clients: Clients, run: Run, job: Job, purpose: Purpose, progress: Progress) -> Run:
    """Fetch the job's small files to where later stages look for them; the job's manifests."""
    # Apart from the run's own files, which stay as they are until all of the new ones are here.
    fetched = run.file("azure", f"{purpose}-files", ".keep").parent
    fetch_output(clients, job, RUN_OUTPUT, fetched, progress)
    brought = _brought(run, purpose)
    metrics = Run(fetched / MANIFESTS).read(MetricsManifest)
    _remove(brought.path)  # an earlier job's
    if purpose == EVALUATE:
        # Its rows replace those of the training job, whose figures must not be shown with them.
        _brought(run, TRAIN).forget(MetricsManifest)
    for path in sorted((fetched / MANIFESTS).glob("*.json")):
        write_atomically(brought.file(path.name), path.read_text(encoding="utf-8"))
    if metrics is not None:
        brought.write(metrics.model_copy(update={"target": AZURE, "job": str(job.name)}))
    for name in SMALL_FILES:
        source, target = fetched / name, run.path / name
        if source.exists():
            _remove(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    _remove(fetched)
    return brought


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _limit(recipe: Recipe) -> float:
    """Seconds to wait for a job."""
    # It ends itself at its own limit, counted from its start; 4 hours more to wait for a machine.
    return recipe.azure.train.timeout_minutes * 60.0 + 4 * 3600.0
