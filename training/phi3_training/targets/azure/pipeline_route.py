"""The route `pipeline`: the system registry's chat_completion_pipeline on a catalogue model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import StageError
from ...recipe import Recipe
from ...run import Run
from .catalogue import Foundation
from .clients import Clients
from .failures import explained
from .outputs import output_path
from .parameters import Parameters, display_name, merge
from .sizes import gpus_in
from .staging import data_files

OUTPUT = "trained_model"
_MADE = "mlflow_model_folder"


@dataclass(frozen=True)
class Prepared:
    """The component with all that it is given, except the chats."""

    component: Any
    parameters: Parameters
    gpus: int
    display_name: str


def prepare(clients: Clients, recipe: Recipe, foundation: Foundation) -> Prepared:
    """Find the component, count GPUs, and settle its parameters."""
    train = recipe.azure.train
    section = train.component
    components = clients.registry(section.registry_name).components
    with explained(f"Looking for the component {section.name}"):
        if section.version == "latest":
            component = components.get(name=section.name, label="latest")
        else:
            component = components.get(name=section.name, version=section.version)
    _check(component)
    gpus = gpus_in(clients, recipe.azure.compute.size, "azure.compute.size")
    inputs = dict(component.inputs)
    parameters = merge(foundation.defaults, train.parameters, inputs)
    shown = display_name(
        foundation.name, recipe.name, parameters.values, gpus, train.instance_count
    )
    return Prepared(component, parameters, gpus, shown)


def _check(component: Any) -> None:
    """The inputs and the output that this route stands on."""
    wanted = {"mlflow_model_path", "train_file_path", "compute_finetune"}
    missing = [name for name in sorted(wanted) if name not in component.inputs]
    missing += [] if _MADE in component.outputs else [f"output {_MADE}"]
    if missing:
        raise StageError(
            f"The component {component.name} {component.version} lacks {', '.join(missing)}: it is "
            "not the fine-tuning pipeline that phi3 knows. Set azure.train.component, or take "
            "azure.train.route=job"
        )


def arguments(
    recipe: Recipe, run: Run, foundation: Foundation, prepared: Prepared
) -> dict[str, Any]:
    """Every input that is sent."""
    from azure.ai.ml import Input

    inputs = prepared.component.inputs
    cluster = recipe.azure.compute.name
    files = data_files(run)
    found: dict[str, Any] = {
        "mlflow_model_path": Input(type="mlflow_model", path=foundation.id),
        "number_of_gpu_to_use_finetuning": prepared.gpus,
        "num_nodes_finetune": recipe.azure.train.instance_count,
        "shm_size_finetune": recipe.azure.train.shm_size,
        "train_file_path": Input(type="uri_file", path=str(files["train"])),
    }
    for stage in ("model_import", "preprocess", "finetune", "model_evaluation"):
        found[f"compute_{stage}"] = cluster
    if "validation" in files:
        # Both, for the component takes a fifth of the training chats for the one that lacks.
        for key in ("validation_file_path", "test_file_path"):
            found[key] = Input(type="uri_file", path=str(files["validation"]))
    found = {key: value for key, value in found.items() if key in inputs}
    return {**found, **prepared.parameters.values}


def pipeline_job(
    recipe: Recipe, run: Run, name: str, foundation: Foundation, prepared: Prepared
) -> Any:
    """The pipeline job, under a name that was written down before."""
    from azure.ai.ml import Output
    from azure.ai.ml.dsl import pipeline

    given = arguments(recipe, run, foundation, prepared)

    @pipeline(display_name=prepared.display_name)  # type: ignore[call-overload,untyped-decorator,unused-ignore]
    def tuned() -> Any:
        step = prepared.component(**given)
        return {OUTPUT: step.outputs[_MADE]}

    with explained("Building the pipeline"):
        job = tuned()
    job.name = name
    job.display_name = prepared.display_name
    job.experiment_name = recipe.azure.train.experiment_name
    job.settings.force_rerun = True
    job.settings.continue_on_step_failure = False
    job.tags = {"created-by": "phi3-promptflow", "phi3-run": run.name, **recipe.azure.tags}
    job.outputs[OUTPUT] = Output(
        type="mlflow_model", path=output_path(name, OUTPUT), mode="rw_mount"
    )
    return job
