"""The route `job`: a command job with our own trainer and Hugging Face weights.

Reads the prepared chats; writes what goes up below <run>/azure/ (chats, recipe, code). The same
content makes the same files, so that nothing is uploaded twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ...carried import carried_files
from ...errors import StageError
from ...manifests import DatasetManifest
from ...progress import Progress
from ...recipe import Recipe
from ...run import Run, fingerprint, sha256_of, write_atomically
from .clients import Clients
from .environments import JOB_ENVIRONMENT, job_conda_file
from .operations import find
from .place import JOB_RUN_TAG, resource_tags
from .sizes import gpus_in
from .storage import code_asset, output_path, upload

if TYPE_CHECKING:
    from azure.ai.ml import Input, Output
    from azure.ai.ml.entities import Command

MODULE = "phi3_training.targets.azure.in_job"
MODEL_OUTPUT, RUN_OUTPUT = "model", "run"


def data_files(run: Run) -> dict[str, Path]:
    """The prepared chats by part. StageError where there are none."""
    run.require(DatasetManifest)
    parts = ("train", "validation", "replay")
    paths = {part: run.path / "data" / f"{part}.jsonl" for part in parts}
    return {part: path for part, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class JobInputs:
    """What a job gets: a folder of chats, and a recipe whose paths are relative to it."""

    # Two inputs, so that another learning rate does not upload the chats again.
    data: Path
    recipe: Path
    training_data: str  # fingerprint of what the tuned model depends on
    questions: str  # fingerprint of what an evaluation depends on, besides the model


def stage_inputs(recipe: Recipe, run: Run, processes: int = 1) -> JobInputs:
    """Put together what goes up. `processes` are those of all machines together."""
    from ...evaluate.questions import extra_files

    folder = _emptied(run.path / "azure" / "data")
    # Without what a job does not read: another endpoint size must not send a new recipe.
    content = recipe.model_dump(mode="json", exclude={"azure", "serve"})
    for part, path in data_files(run).items():
        _copy(path, folder / "data" / f"{part}.jsonl")
    content["data"] |= {
        "train": ["data/train.jsonl"],
        "validation": ["data/validation.jsonl"],
        "replay": [],
    }
    # Azure ML starts one process for each GPU itself; the trainer only has to know how many.
    content["finetune"] |= {"num_processes": processes, "num_machines": 1, "report_to": []}
    if recipe.base is not None:
        content["base"]["data"] = _copy_all(folder, "base", recipe.base.data)
    if local_base(recipe) is not None:
        content["model"]["name_or_path"] = "base-model"  # goes up as an input of its own
    extra = extra_files(recipe.evaluate)
    for part in ("canary", "probes"):
        paths = [path for name, path in extra if name == part]
        content["evaluate"][part] = _copy_all(folder, part, paths)
    settings = recipe.evaluate.model_dump(mode="json", exclude={"canary", "probes"})
    files_asked = content_hash(folder, "data/*", "files/canary-*", "files/probes-*")
    questions = fingerprint([settings, recipe.ask, files_asked])
    path = run.file("azure", "recipe.json")
    text = json.dumps({"asked": questions, "recipe": content}, indent=1, sort_keys=True)
    write_atomically(path, text + "\n")
    return JobInputs(folder, path, content_hash(folder, "data/*", "files/base-*"), questions)


def local_base(recipe: Recipe) -> Path | None:
    """The folder of weights that the recipe names instead of a model of the hub."""
    folder = Path(recipe.model.name_or_path).expanduser()
    return folder.resolve() if not recipe.model.is_tiny and folder.is_dir() else None


def content_hash(folder: Path, *patterns: str) -> str:
    """A fingerprint of a folder's files that match a pattern, by name and content."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return fingerprint([[path.relative_to(folder).as_posix(), sha256_of(path)] for path in paths])


def stage_code(run: Run) -> Path:
    """The folder with what of our packages the job runs, as this machine has it."""
    folder = _emptied(run.path / "azure" / "code")
    for name, path in carried_files(MODULE).items():
        _copy(path, folder / name)
    return folder


def _copy_all(folder: Path, part: str, paths: Iterable[Path]) -> list[str]:
    names = []
    for number, path in enumerate(paths):
        name = f"files/{part}-{number}{path.suffix}"
        _copy(path, folder / name)
        names.append(name)
    return names


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise StageError(
            f"{source} cannot be copied for the job: {error.strerror}; free disk space or fix the "
            f"permissions, then run the same command again"
        ) from None


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


@dataclass(frozen=True)
class Sent:
    """Where in Azure is what a job reads: addresses of data, and the ARM id of the code."""

    data: str
    recipe: str
    code: str
    base: str | None = None  # the weights of this machine's folder


def send(clients: Clients, recipe: Recipe, run: Run, processes: int, progress: Progress) -> Sent:
    """Upload what a job reads and is not there yet. `processes` are those of all machines."""
    staged, base = stage_inputs(recipe, run, processes), local_base(recipe)
    return Sent(
        data=upload(clients, staged.data, progress).path,
        recipe=upload(clients, staged.recipe, progress).path,
        code=code_asset(clients, stage_code(run), progress),
        base=None if base is None else upload(clients, base, progress).path,
    )


def train_job(
    clients: Clients, recipe: Recipe, run: Run, name: str, machines: Machines, sent: Sent
) -> Command:
    """The command job that fine-tunes, measures and saves an MLflow model."""
    from azure.ai.ml import Input, Output

    inputs, words = _common_inputs(sent)
    words.insert(0, "train")
    if sent.base is not None:
        inputs["base"] = Input(type="uri_folder", path=sent.base)
        words.append("--base ${{inputs.base}}")
    words += ["--run-output ${{outputs.run}}", "--model-output ${{outputs.model}}"]
    # Uploaded after the command has ended, so that no half-written file is read.
    outputs = {
        RUN_OUTPUT: Output(type="uri_folder", path=output_path(name, RUN_OUTPUT), mode="upload"),
        MODEL_OUTPUT: Output(
            type="mlflow_model", path=output_path(name, MODEL_OUTPUT), mode="upload"
        ),
    }
    return _command(
        clients, recipe, run, name, words, inputs, outputs, machines, sent, "fine-tuning"
    )


def evaluate_job(
    clients: Clients,
    recipe: Recipe,
    run: Run,
    name: str,
    tuned: Input,
    base: Input | None,
    sent: Sent,
) -> Command:
    """The command job that measures a tuned model (an MLflow model in Azure) against its base."""
    from azure.ai.ml import Output

    inputs, words = _common_inputs(sent)
    inputs["tuned"] = tuned
    words = ["evaluate", *words, "--tuned ${{inputs.tuned}}"]
    if base is not None:
        inputs["base"] = base
        words.append("--base ${{inputs.base}}")
    words.append("--run-output ${{outputs.run}}")
    outputs = {
        RUN_OUTPUT: Output(type="uri_folder", path=output_path(name, RUN_OUTPUT), mode="upload")
    }
    return _command(
        clients, recipe, run, name, words, inputs, outputs, Machines(1, 1), sent, "evaluation"
    )


def _common_inputs(sent: Sent) -> tuple[dict[str, Input], list[str]]:
    """The inputs that both jobs have, and the words that hand them to the command."""
    from azure.ai.ml import Input

    inputs = {
        "data": Input(type="uri_folder", path=sent.data),
        "recipe": Input(type="uri_file", path=sent.recipe),
    }
    return inputs, [f"--{name} ${{{{inputs.{name}}}}}" for name in inputs]


def _command(
    clients: Clients,
    recipe: Recipe,
    run: Run,
    name: str,
    words: list[str],
    inputs: dict[str, Input],
    outputs: dict[str, Output],
    machines: Machines,
    sent: Sent,
    what: str,
) -> Command:
    from azure.ai.ml import command
    from azure.ai.ml.entities import Environment

    train, named = recipe.azure.train, recipe.azure.train.environment
    environment: str | Environment
    if named.name is not None:
        is_latest = named.version == "latest"
        if named.registry_name is None:
            version = "@latest" if is_latest else f":{named.version}"
            environment = f"azureml:{named.name}{version}"
        else:
            where = f"azureml://registries/{named.registry_name}/environments/{named.name}"
            version = "labels/latest" if is_latest else f"versions/{named.version}"
            environment = f"{where}/{version}"
    else:
        # Ours, by a version derived from its content: one that exists has its image built already.
        path, version = job_conda_file(recipe, run)
        read = partial(clients.ml.environments.get, version=version)
        if find("environment", JOB_ENVIRONMENT, read) is not None:
            environment = f"azureml:{JOB_ENVIRONMENT}:{version}"
        else:
            environment = Environment(
                name=JOB_ENVIRONMENT,
                version=version,
                image=named.image,
                conda_file=str(path),
                description="What phi3-promptflow's trainer needs",
            )
    is_distributed = machines.all_processes > 1
    # Azure ML then sets RANK, LOCAL_RANK, WORLD_SIZE and NODE_RANK in each process.
    distribution: dict[str, str | int] = {
        "type": "pytorch",
        "process_count_per_instance": machines.processes,
    }
    return command(
        name=name,
        display_name=f"{recipe.name} {what}",
        description=f"phi3-promptflow: {what} of {recipe.name}",
        experiment_name=train.experiment_name,
        code=sent.code,
        command=" ".join(["python", "-m", MODULE, *words]),
        inputs=inputs,
        outputs=outputs,
        environment=environment,
        environment_variables={
            "PYTHONUNBUFFERED": "1",  # the log is followed line by line
            "TOKENIZERS_PARALLELISM": "false",  # its threads may deadlock in forked processes
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        },
        compute=recipe.azure.compute.name,
        instance_count=machines.instances if is_distributed else 1,
        # Processes exchange tensors by shared memory, of which Docker's default is 64 MB.
        shm_size=train.shm_size,
        timeout=train.timeout_minutes * 60,  # seconds; the job then ends itself and stops billing
        tags={JOB_RUN_TAG: run.name, **resource_tags(recipe.azure)},
        distribution=distribution if is_distributed else None,
    )


def settings_digest(recipe: Recipe) -> str:
    """What of the recipe a command job depends on, besides the chats."""
    content = {
        "recipe": recipe.model_dump(mode="json", include={"model", "base", "finetune"}),
        "train": recipe.azure.train.model_dump(mode="json"),
        "size": recipe.azure.compute.size,
    }
    return json.dumps(content, sort_keys=True)
