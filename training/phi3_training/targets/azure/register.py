"""The stage `register`: the job's MLflow model as a version in the workspace, with its tags.

Reads the manifests `dataset`, `model`, `metrics` and `gate`. A version that this job's model has
already is found by its tag, so that none is registered twice.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ... import console
from ...errors import StageError
from ...manifests import (
    DatasetManifest,
    GateManifest,
    MetricsManifest,
    ModelManifest,
    RegistrationManifest,
)
from ...progress import no_progress
from ...recipe import Recipe
from ...run import RECIPE_FILE, Run, fingerprint, sha256_of
from .clients import Clients
from .failures import explained, message_of
from .operations import is_absent, within
from .place import AZURE, RUN_TAG, RunResource, record

if TYPE_CHECKING:
    from azure.ai.ml.entities import Model

log = logging.getLogger(__name__)

JOB_TAG = "phi3_job"
_LONGEST_TAG = 256  # characters of a tag's value that Azure takes
_LONGEST_NAME = 255  # of a model


def register(clients: Clients, recipe: Recipe, run: Run) -> RegistrationManifest:
    """Register the model that the run's job made."""
    job_model = run.require(ModelManifest)
    tags = _tags(recipe, run, job_model)
    name = model_name(recipe, run, job_model)
    versions = _versions(clients, name)
    model = _of_job(versions, job_model.job)
    if model is None and name != run.name:  # as it was called until 2026-11
        model = _of_job(_versions(clients, run.name), job_model.job)
    if model is not None:
        how = "the job's model was already registered"
    else:
        # Chosen here and not by Azure, so that it is on record before the call, and a repeated call
        # meets the same version. Versions that are not whole numbers are somebody else's scheme.
        numbers = [int(str(item.version)) for item in versions if str(item.version).isdecimal()]
        version = str(max(numbers, default=0) + 1)
        record(run, RunResource("model", f"{name}:{version}"))
        model, source = _create(clients, name, version, job_model, tags)
        how = f"from {source}"
    return RegistrationManifest(
        target=AZURE,
        model=str(model.name),
        model_version=str(model.version),
        model_id=model.id,
        tags=tags,
        choices=[how],
    )


def model_name(recipe: Recipe, run: Run, job_model: ModelManifest) -> str:
    """What the registered model is called: the base it was tuned from, then the run."""
    # A run is called after its recipe, and model.name_or_path may name another base than that:
    # a Phi-4 must not be served as phi3-mini.
    found = job_model.foundation_model
    if found is None and recipe.model.is_tiny:
        return run.name
    base = found.name if found else recipe.model.name_or_path.rstrip("/").rsplit("/", 1)[-1]
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-._")
    whole = run.name if base.lower() in run.name.lower() else f"{base}-{run.name}"
    return whole[:_LONGEST_NAME]


def _tags(recipe: Recipe, run: Run, job_model: ModelManifest) -> dict[str, str]:
    """What a registered model says of itself: data, recipe, base and figures."""
    dataset = run.require(DatasetManifest)
    hashes = sorted(part.sha256 for part in dataset.outputs.values())
    path = run.path / RECIPE_FILE
    base = job_model.foundation_model
    metrics, gate = run.read(MetricsManifest), run.read(GateManifest)
    measured = {} if metrics is None else metrics.after.get("validation", {})
    figures = {f"validation_{name}": f"{value:.6g}" for name, value in measured.items()}
    tags = {
        JOB_TAG: job_model.job,
        "phi3_route": job_model.route or None,
        RUN_TAG: run.name,
        "data_hash": fingerprint(hashes),
        "recipe": recipe.name,
        "recipe_hash": sha256_of(path)[:16] if path.is_file() else None,
        "base_model": base.name if base else recipe.model.name_or_path,
        "base_revision": job_model.base_revision or (base.version if base else None),
        **figures,
        "gate_passed": None if gate is None else gate.passed,
    }
    return {name: str(value)[:_LONGEST_TAG] for name, value in tags.items() if value is not None}


def _versions(clients: Clients, name: str) -> list[Model]:
    """The versions of a model, newest first; none where the name is new."""
    from azure.core.exceptions import HttpResponseError

    with explained(f"Listing the versions of the model {name}"):
        try:
            return list(clients.ml.models.list(name=name))
        except HttpResponseError as error:
            if not is_absent(error):
                raise
            return []


def _of_job(versions: list[Model], job: str) -> Model | None:
    return next((model for model in versions if (model.tags or {}).get(JOB_TAG) == job), None)


def _create(
    clients: Clients, name: str, version: str, job_model: ModelManifest, tags: dict[str, str]
) -> tuple[Model, str]:
    """Register from the first of the job's places that Azure takes; the model and the place."""
    from azure.ai.ml.entities import Model
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError, HttpResponseError

    job, output = job_model.job, job_model.output
    refusals = []
    for source in _sources(clients, job_model):
        entity = Model(
            name=name,
            version=version,
            path=source,
            type=job_model.model_type or "mlflow_model",
            tags=tags,
            description=f"Tuned with phi3-promptflow by the job {job}",
        )
        try:  # nothing is uploaded: Azure takes the files from where they are
            return clients.ml.models.create_or_update(entity), source
        except (HttpResponseError, MlException) as error:
            # Another 4xx means that Azure does not take this place (NoMatchingArtifactsFoundFromJob
            # is the usual one); the next may do.
            status = getattr(error, "status_code", 400) or 400
            if status == 409:  # it was made, and the answer was lost
                model = _of_job(_versions(clients, name), job)
                if model is not None:
                    return model, source
            if status in (401, 403, 408, 409, 429) or status >= 500:
                with explained(f"Registering the model {name}"):
                    raise
            refusals.append(f"  {source}: {message_of(error)}")
            log.info("Azure does not accept the model from %s", source)
        except AzureError:
            with explained(f"Registering the model {name}"):
                raise
    # The last way, for some 8 GB down and up again: a Phi-3 mini in bf16.
    with TemporaryDirectory(prefix="phi3-model-") as folder:
        doing = f"Downloading the model of the job {job}"
        console.note(f"{doing} and uploading it again: Azure takes it from none of its places")
        fetch = partial(clients.ml.jobs.download, job, download_path=folder, output_name=output)
        limit = clients.poll.upload_timeout
        with explained(doing):
            within(doing, fetch, no_progress, limit=limit)
        models = sorted(Path(folder).rglob("MLmodel"), key=lambda path: len(path.parts))
        if not models:
            tried = "\n".join(refusals)
            raise StageError(
                f"The job {job} has no MLflow model that Azure accepts. Tried:\n{tried}\n"
                "Fix: check the job's outputs in the studio; train again with: "
                "phi3 up --on azure --again finetune"
            )
        doing = f"Registering the model {name} from its download"
        with explained(doing):
            entity = Model(
                name=name,
                version=version,
                path=models[0].parent,
                type="mlflow_model",
                tags=tags,
            )
            put = partial(clients.ml.models.create_or_update, entity)
            return within(doing, put, no_progress, limit=limit), "a download of the job's output"


def _sources(clients: Clients, job_model: ModelManifest) -> Iterator[str]:
    """Where the model may be: the job's output, the path that Azure names, a step's output."""
    # Registering from the output keeps the lineage from model to job. For a pipeline Azure now and
    # then finds nothing there (azure-sdk-for-python issue 33978), and the model is only an output
    # of one of its steps. Each is looked for only when the one before was refused.
    job, output = job_model.job, job_model.output
    yield job_model.model_output or f"azureml://jobs/{job}/outputs/{output}"
    with explained(f"Reading the job {job}"):
        outputs = getattr(clients.ml.jobs.get(job), "outputs", None) or {}
        path = getattr(outputs.get(output), "path", None)
    if path:
        yield str(path)
    if job_model.route == "pipeline":
        with explained(f"Listing the steps of the job {job}"):
            steps = [str(step.name) for step in clients.ml.jobs.list(parent_job_name=job)]
        for step in steps:
            yield f"azureml://jobs/{step}/outputs/mlflow_model_folder"
