"""Registering a job's model: once for each job, from the first of its places that Azure takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.exceptions import HttpResponseError

from phi3_training.errors import StageError
from phi3_training.manifests import (
    DatasetManifest,
    Foundation,
    GateManifest,
    MetricsManifest,
    ModelManifest,
    Prepared,
    RegistrationManifest,
    Resampling,
)
from phi3_training.recipe import Recipe
from phi3_training.recipe.azure import PollSection
from phi3_training.run import Run
from phi3_training.targets.azure.place import RunResource, recorded_resources
from phi3_training.targets.azure.register import model_name, register

JOB = "phi3-train-x-1"
OUTPUT = f"azureml://jobs/{JOB}/outputs/trained_model"
PATH = "azureml://datastores/workspaceblobstore/paths/azureml/abc/trained_model"
CHILD = "azureml://jobs/step-2/outputs/mlflow_model_folder"


def refusal(status: int, message: str = "No matching artifacts") -> HttpResponseError:
    error = HttpResponseError(message=message)
    error.status_code = status
    return error


class Registry:
    """A workspace's models and the job's outputs; `takes` says what a path is answered with."""

    def __init__(self, takes: Callable[[str], HttpResponseError | None]) -> None:
        self.takes = takes
        self.held: list[Any] = []
        self.tried: list[str] = []
        self.models = SimpleNamespace(list=self._list, create_or_update=self._put)
        self.jobs = SimpleNamespace(get=self._job, list=self._steps, download=self._download)

    def _list(self, name: str) -> list[Any]:
        return [model for model in self.held if model.name == name]

    def _put(self, model: Any) -> Any:
        self.tried.append(str(model.path))
        refused = self.takes(str(model.path))
        if refused is not None:
            raise refused
        self.held.append(model)
        return model

    def _job(self, name: str) -> Any:
        return SimpleNamespace(outputs={"trained_model": SimpleNamespace(path=PATH)}, name=name)

    def _steps(self, parent_job_name: str) -> list[Any]:
        assert parent_job_name == JOB
        return [SimpleNamespace(name="step-1"), SimpleNamespace(name="step-2")]

    def _download(self, name: str, download_path: str, output_name: str) -> None:
        folder = Path(download_path) / "named-outputs" / output_name / "mlflow"
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text(name)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "r")
    run.write(DatasetManifest(outputs={"train": Prepared(path="t", sha256="abc", rows=1)}))
    run.write(
        ModelManifest(
            path="azure/train",
            job=JOB,
            route="pipeline",
            output="trained_model",
            foundation_model=Foundation(name="Phi-4-mini-instruct", version="1", id="id"),
        )
    )
    run.write(
        MetricsManifest(
            before={},
            after={"validation": {"exact_match": 0.5, "rows": 6}},
            comparisons={},
            rows="rows",
            settings=Resampling(confidence=0.95, resamples=100, seed=1),
        )
    )
    run.write(GateManifest(passed=True, rules=[]))
    return run


def registered(registry: Registry, run: Run) -> RegistrationManifest:
    recipe = Recipe.model_construct(name="phi3")
    clients: Any = SimpleNamespace(ml=registry, poll=PollSection())
    return register(clients, recipe, run)


def test_from_the_jobs_output_with_its_tags(run: Run) -> None:
    registry = Registry(lambda _path: None)

    made = registered(registry, run)

    assert (made.model, made.model_version) == ("Phi-4-mini-instruct-r", "1")
    assert registry.tried == [OUTPUT]
    (model,) = registry.held
    assert model.type == "mlflow_model"
    assert model.tags["phi3_job"] == JOB
    assert model.tags["base_model"] == "Phi-4-mini-instruct"
    assert model.tags["base_revision"] == "1"
    assert model.tags["validation_exact_match"] == "0.5"
    assert model.tags["gate_passed"] == "True"
    assert len(model.tags["data_hash"]) == 16
    assert recorded_resources(run, "model") == [RunResource("model", "Phi-4-mini-instruct-r:1")]


def test_a_jobs_model_is_registered_once(run: Run) -> None:
    registry = Registry(lambda _path: None)
    first = registered(registry, run)

    again = registered(registry, run)

    assert again.model_version == first.model_version
    assert len(registry.tried) == 1


def test_a_model_that_is_registered_under_the_runs_name_alone_is_found(run: Run) -> None:
    registry = Registry(lambda _path: None)
    older = SimpleNamespace(name="r", version="3", id="id", tags={"phi3_job": JOB})
    registry.held.append(older)

    assert registered(registry, run).model_version == "3"
    assert registry.tried == []


@pytest.mark.parametrize(
    ("base", "run_name", "called"),
    [
        ("tiny", "phi3-tiny", "phi3-tiny"),
        ("microsoft/Phi-4-mini-instruct", "phi3-mini-azure", "Phi-4-mini-instruct-phi3-mini-azure"),
        ("./my weights/", "mine", "my-weights-mine"),
        ("o/phi", "my-phi", "my-phi"),
    ],
)
def test_a_model_is_called_after_its_base(
    tmp_path: Path, base: str, run_name: str, called: str
) -> None:
    content = {"name": "x", "model": {"name_or_path": base}, "data": {"train": ["x"]}}
    if base == "tiny":
        content["base"] = {"data": ["x"]}
    run = Run.open(tmp_path / run_name)
    manifest = ModelManifest(path=".", job=JOB)
    assert model_name(Recipe.model_validate(content), run, manifest) == called


def test_another_jobs_model_is_the_next_version(run: Run) -> None:
    registry = Registry(lambda _path: None)
    registered(registry, run)
    run.write(run.require(ModelManifest).model_copy(update={"job": "another"}))

    assert registered(registry, run).model_version == "2"


def test_the_next_place_where_one_is_not_taken(run: Run) -> None:
    registry = Registry(lambda path: None if path == CHILD else refusal(400))

    made = registered(registry, run)

    steps = [f"azureml://jobs/step-{n}/outputs/mlflow_model_folder" for n in (1, 2)]
    assert registry.tried == [OUTPUT, PATH, *steps]
    assert made.choices == [f"from {CHILD}"]


def test_a_download_is_the_last_way(run: Run) -> None:
    registry = Registry(lambda path: refusal(404) if path.startswith("azureml://") else None)

    made = registered(registry, run)

    assert made.choices == ["from a download of the job's output"]
    assert registry.tried[-1].endswith("mlflow")


def test_a_lost_answer_is_not_a_second_version(run: Run) -> None:
    """The registry made it and said so to nobody; the next try is refused as a conflict."""
    registry = Registry(lambda _path: refusal(409, "exists"))
    tags = {"phi3_job": JOB}
    made = SimpleNamespace(name="phi3", version="1", id="id", tags=tags)
    listed = iter([[], [], [made]])
    registry.models.list = lambda name: next(listed)

    assert registered(registry, run).model_version == "1"
    assert registry.tried == [OUTPUT]


@pytest.mark.parametrize("status", [403, 500])
def test_a_refusal_that_is_not_about_the_place_is_reported(run: Run, status: int) -> None:
    registry = Registry(lambda _path: refusal(status, "no"))

    with pytest.raises(StageError, match="Registering the model Phi-4-mini-instruct-r failed"):
        registered(registry, run)

    assert registry.tried == [OUTPUT]
