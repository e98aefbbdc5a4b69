"""The route `job`: a command job with our own trainer and Hugging Face weights.

One process for each GPU and as many machines as the recipe says: the job's distribution settings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...recipe import Recipe
from ...run import Run
from .clients import Clients
from .outputs import output_path
from .sizes import gpus_in
from .staging import Staged, conda_file, stage, stage_code
from .waiting import look

ENVIRONMENT = "phi3-promptflow"
MODULE = "phi3_training.targets.azure.in_job"
MODEL, RUN = "model", "run"


@dataclass(frozen=True)
class Machines:
    """How many machines and how many processes on each."""

    instances: int
    processes: int

    @property
    def all_processes(self) -> int:
        """On all machines together."""
        return self.instances * self.processes


def machines_of(clients: Clients, recipe: Recipe) -> Machines:
    """As many processes as the size has GPUs, unless the recipe says otherwise."""
    train = recipe.azure.train
    each = train.process_count_per_instance
    if each is None:
        each = gpus_in(clients, recipe.azure.compute.size, "azure.compute.size")
    return Machines(train.instance_count, each)


def train_job(clients: Clients, recipe: Recipe, run: Run, name: str, machines: Machines) -> Any:
    """The command job that fine-tunes, measures and saves an MLflow model."""
    from azure.ai.ml import Input, Output

    inputs, words = _chats(stage(recipe, run, machines.all_processes))
    base = Path(recipe.model.name_or_path).expanduser()
    words.insert(0, "train")
    if not recipe.model.is_tiny and base.is_dir():
        inputs["base"] = Input(type="uri_folder", path=str(base.resolve()))
        words.append("--base ${{inputs.base}}")
    words += ["--run-output ${{outputs.run}}", "--model-output ${{outputs.model}}"]
    outputs = {
        RUN: Output(type="uri_folder", path=output_path(name, RUN), mode="upload"),
        MODEL: Output(type="mlflow_model", path=output_path(name, MODEL), mode="upload"),
    }
    return _command(clients, recipe, run, name, words, inputs, outputs, machines, "fine-tuning")


def evaluate_job(
    clients: Clients, recipe: Recipe, run: Run, name: str, tuned: Any, base: Any | None
) -> Any:
    """The command job that measures a tuned model (an MLflow model in Azure) against its base."""
    from azure.ai.ml import Output

    inputs, words = _chats(stage(recipe, run))
    inputs["tuned"] = tuned
    words = ["evaluate", *words, "--tuned ${{inputs.tuned}}"]
    if base is not None:
        inputs["base"] = base
        words.append("--base ${{inputs.base}}")
    words.append("--run-output ${{outputs.run}}")
    outputs = {RUN: Output(type="uri_folder", path=output_path(name, RUN), mode="upload")}
    one = Machines(1, 1)
    return _command(clients, recipe, run, name, words, inputs, outputs, one, "evaluation")


def _chats(staged: Staged) -> tuple[dict[str, Any], list[str]]:
    """The inputs that every job has, and the words that hand them to the command."""
    from azure.ai.ml import Input

    inputs = {
        "data": Input(type="uri_folder", path=str(staged.data)),
        "recipe": Input(type="uri_file", path=str(staged.recipe)),
    }
    return inputs, [f"--{name} ${{{{inputs.{name}}}}}" for name in inputs]


def _command(
    clients: Clients,
    recipe: Recipe,
    run: Run,
    name: str,
    words: list[str],
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    machines: Machines,
    what: str,
) -> Any:
    from azure.ai.ml import command

    train = recipe.azure.train
    several = machines.all_processes > 1
    return command(
        name=name,
        display_name=f"{recipe.name} {what}",
        description=f"phi3-promptflow: {what} of {recipe.name}",
        experiment_name=train.experiment_name,
        code=str(stage_code(run)),
        command=" ".join(["python", "-m", MODULE, *words]),
        inputs=inputs,
        outputs=outputs,
        environment=environment(clients, recipe, run),
        environment_variables=_variables(),
        compute=recipe.azure.compute.name,
        instance_count=machines.instances if several else 1,
        shm_size=train.shm_size,
        timeout=train.timeout_minutes * 60,
        tags={"created-by": "phi3-promptflow", "phi3-run": run.name, **recipe.azure.tags},
        **_distribution(machines),
    )


def _distribution(machines: Machines) -> dict[str, Any]:
    if machines.all_processes == 1:
        return {}
    processes = machines.processes
    return {"distribution": {"type": "pytorch", "process_count_per_instance": processes}}


def _variables() -> dict[str, str]:
    return {
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }


def environment(clients: Clients, recipe: Recipe, run: Run) -> Any:
    """The environment that the recipe names, else ours, by a version made from what is in it."""
    from azure.ai.ml.entities import Environment

    named = recipe.azure.train.environment
    if named.name is not None:
        return _reference(named.name, named.version, named.registry_name)
    path, version = conda_file(recipe, run)
    environments = clients.ml.environments
    doing = f"Looking for the environment {ENVIRONMENT}"
    if look(lambda: environments.get(ENVIRONMENT, version=version), doing) is not None:
        return f"azureml:{ENVIRONMENT}:{version}"
    return Environment(
        name=ENVIRONMENT,
        version=version,
        image=named.image,
        conda_file=str(path),
        description="What phi3-promptflow's trainer needs",
    )


def _reference(name: str, version: str, registry: str | None) -> str:
    latest = version == "latest"
    if registry is None:
        return f"azureml:{name}@latest" if latest else f"azureml:{name}:{version}"
    where = f"azureml://registries/{registry}/environments/{name}"
    return f"{where}/labels/latest" if latest else f"{where}/versions/{version}"


def inputs_digest(recipe: Recipe) -> str:
    """What of the recipe a command job depends on, beside the chats."""
    azure = recipe.azure
    content = {
        "recipe": recipe.model_dump(mode="json", include={"model", "base", "finetune"}),
        "train": azure.train.model_dump(mode="json"),
        "size": azure.compute.size,
    }
    return json.dumps(content, sort_keys=True)
