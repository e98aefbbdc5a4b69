"""The bodies of both routes' jobs, as they would be sent: processes, machines, rerun and stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.ai.ml import load_component
from azure.ai.ml.entities._job.pipeline.pipeline_job import PipelineJob

from phi3_training.recipe import Recipe
from phi3_training.run import Run
from phi3_training.targets.azure import command_job, pipeline_job
from phi3_training.targets.azure.pipeline_job import FoundationModel, merge_parameters

from ...component_inputs import INPUTS
from .azure_wire import Answer, Wire, clients, run_with_chats

STORE = "azureml://datastores/workspaceblobstore/paths/phi3/uploads"
CODE = (
    "/subscriptions/s/resourceGroups/g/providers/Microsoft.MachineLearningServices/workspaces/w"
    "/codes/phi3-code/versions/0a1b"
)
SENT = command_job.Sent(f"{STORE}/1/data", f"{STORE}/2/recipe.json", CODE)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_with_chats(tmp_path)


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "mine",
            "model": {"name_or_path": "org/Phi"},
            "data": {"train": ["x"]},
            "evaluate": {"canary": [], "probes": []},
            "azure": {"train": train, "compute": {"max_instances": 2}},
        }
    )


def _nothing_there(method: str, url: str) -> Answer:
    del method, url
    return 404, {"error": {"code": "NotFound", "message": "not there"}}


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 4), (2, 1), (1, 4)])
def test_machines_times_processes_travel_as_pytorch_distribution(
    run: Run, tmp_path: Path, nodes: int, gpus: int
) -> None:
    wanted = recipe(instance_count=nodes, process_count_per_instance=gpus)
    cloud = clients(Wire(_nothing_there), tmp_path)
    machines = command_job.machines_of(cloud, wanted)

    job = command_job.train_job(cloud, wanted, run, "job-1", machines, SENT)
    sent = job._to_job()._to_rest_object().properties.serialize()

    assert sent["distribution"] == {
        "distributionType": "PyTorch",
        "processCountPerInstance": gpus,
    }
    assert sent["resources"]["instanceCount"] == nodes
    assert sent["codeId"] == SENT.code
    staged = command_job.stage_inputs(wanted, run, machines.all_processes).recipe.read_text()
    assert f'"num_processes": {nodes * gpus}' in staged
    assert "HF_TOKEN" not in str(sent)


def test_one_process_wants_no_distribution(run: Run, tmp_path: Path) -> None:
    wanted = recipe(process_count_per_instance=1)
    cloud = clients(Wire(_nothing_there), tmp_path)
    machines = command_job.machines_of(cloud, wanted)
    job = command_job.train_job(cloud, wanted, run, "job-1", machines, SENT)
    assert job.distribution is None
    assert job.resources.instance_count == 1


def _component(folder: Path) -> Any:
    """The catalogue's pipeline, as a component of the SDK with the inputs that it has."""
    names = {"string", "integer", "number", "boolean", "uri_file", "mlflow_model", "mltable",
             "custom_model"}  # fmt: skip
    lines = ["$schema: https://azuremlschemas.azureedge.net/latest/commandComponent.schema.json",
             "type: command", "name: chat_completion_pipeline", "version: 0.0.82",
             "command: echo", "environment: azureml:any:1", "inputs:"]  # fmt: skip
    for name, spec in INPUTS.items():
        assert spec["type"] in names
        lines.append(f"  {name}: {{type: {spec['type']}, optional: true}}")
    lines += ["outputs:", "  mlflow_model_folder: {type: mlflow_model}"]
    path = folder / "component.yaml"
    path.write_text("\n".join(lines) + "\n")
    return load_component(path)


def test_the_pipeline_reruns_every_step_and_stops_at_the_first_that_fails(
    run: Run, tmp_path: Path
) -> None:
    foundation = FoundationModel("Phi-4", "8", "azureml://registries/azureml/models/Phi-4/versions/8",
                            None, "", {}, None)  # fmt: skip
    prepared = pipeline_job.PreparedPipeline(
        _component(tmp_path), merge_parameters({}, {}, INPUTS), 2, "shown"
    )
    job = pipeline_job.pipeline_job(
        recipe(), run, "job-1", foundation, prepared, {"train": "azureml://datastores/s/paths/t"}
    )

    assert isinstance(job, PipelineJob)
    settings = job._to_rest_object().properties.settings
    assert settings["force_rerun"] is True
    assert settings["continue_on_step_failure"] is False
    assert (job.name, job.display_name) == ("job-1", "shown")
    (step,) = job.jobs.values()
    sent = step._to_rest_object()["inputs"]
    assert sent["number_of_gpu_to_use_finetuning"]["value"] == "2"
    assert set(sent) <= set(INPUTS)
    assert job.outputs["trained_model"].path.endswith("/phi3/job-1/trained_model")
