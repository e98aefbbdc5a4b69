"""Carries one job out: `python -m phi3_rehearsal job FOLDER`.

Reads FOLDER/job.json; writes FOLDER/status.json, the job's logs and outputs below blobs/, and
works in FOLDER/work.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import yaml

from . import tiny_model
from .cloud import now
from .offers import INPUTS
from .processes import RehearsalError, write_atomically
from .wire import Json


@dataclass
class JobInput:
    """An input as it is given to the command: a literal, or the file or folder it is in."""

    literal: str | None = None
    path: str | None = None


@dataclass
class JobPlan:
    """What the process of a job has to do; as job.json. All paths are of this machine."""

    inputs: dict[str, JobInput]
    # Of a command job.
    command: str | None = None  # None: the fine-tuning pipeline
    code: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    nodes: int = 1
    processes: int = 1  # on each node
    # Of the pipeline: for each output of the component, the pipeline's output that it becomes.
    bound: dict[str, str] = field(default_factory=dict)
    # Known once the job is accepted.
    name: str = ""
    experiment: str = ""
    workspace: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    artifacts: str = ""
    catalogue: str = ""
    # Injected faults.
    slow_seconds: float = 0.0
    failure: Json | None = None

    @classmethod
    def read(cls, file: Path) -> JobPlan:
        """Read job.json."""
        content = json.loads(file.read_text(encoding="utf-8"))
        inputs = {name: JobInput(**value) for name, value in content.pop("inputs").items()}
        return cls(inputs=inputs, **content)

    def write(self, file: Path) -> None:
        """Write job.json."""
        write_atomically(file, json.dumps(dataclasses.asdict(self), indent=1))

    def log(self, name: str) -> Path:
        """Where a log of the job is, with Azure's names."""
        path = Path(self.artifacts, "user_logs", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def run_job(folder: Path) -> int:
    """Run the job; how it ended is in status.json whatever happens."""
    plan = JobPlan.read(folder / "job.json")
    status: Json = {"status": "Running", "start": now()}
    write_atomically(folder / "status.json", json.dumps(status))
    try:
        error = _run(folder, plan)
    except (RehearsalError, OSError) as problem:
        error = {"code": "UserError", "message": str(problem)}
    status |= {"status": "Failed" if error else "Completed", "end": now()}
    write_atomically(
        folder / "status.json", json.dumps(status | ({"error": error} if error else {}))
    )
    return 1 if error else 0


def _run(folder: Path, plan: JobPlan) -> Json | None:
    """The error with which the job ends, or None."""
    time.sleep(plan.slow_seconds)
    if plan.failure:
        text = f"{plan.failure['code']}: {plan.failure['message']}\n"
        plan.log("std_log.txt").write_text(text, encoding="utf-8")
        return plan.failure
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    # Each input as text: a value, or the path of its copy.
    inputs: dict[str, str] = {}
    for name, item in plan.inputs.items():
        if item.path is None:
            inputs[name] = str(item.literal)
            continue
        source = Path(item.path)
        if source == tiny_model.folder_in(Path(plan.catalogue)):
            tiny_model.make(Path(plan.catalogue))  # half a minute, the first time it is needed
        target = work / "inputs" / name / source.name
        tiny_model.link(source, target)
        inputs[name] = str(target)
    if plan.command is None:
        outputs = _run_pipeline(plan, inputs, work)
    else:
        outputs = {name: work / "outputs" / name for name in plan.outputs}
        for place in outputs.values():
            place.mkdir(parents=True)
        error = _run_command(plan, plan.command, inputs, outputs, work)
        if error:
            return error
    for name, place in outputs.items():
        tiny_model.link(place, Path(plan.outputs[name]))
    shutil.rmtree(work)
    return None


# --- command jobs ---

_PLACE = re.compile(r"\$\{\{(inputs|outputs)\.([\w-]+)\}\}")
_OPTIONAL = re.compile(r"\$\[\[(.*?)\]\]", re.DOTALL)


def _run_command(
    plan: JobPlan, command: str, inputs: dict[str, str], outputs: dict[str, Path], work: Path
) -> Json | None:
    """Run the command in every process of every node; the error of the first that fails."""
    code = work / "code"
    if plan.code:
        tiny_model.link(Path(plan.code), code)
    code.mkdir(exist_ok=True)
    text = _filled(command, {"inputs": inputs, "outputs": {k: str(v) for k, v in outputs.items()}})
    count = plan.nodes * plan.processes
    with socket.socket() as probe:  # a free port, for the ranks to find each other
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    processes: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    for rank in range(count):
        name = "std_log.txt" if count == 1 else f"std_log_process_{rank:02d}.txt"
        logs.append(plan.log(name).open("wb"))
        processes.append(
            subprocess.Popen(  # noqa: S603 - the user's own command, as on Azure
                ["/bin/bash", "-c", text],
                cwd=code,
                env=_variables(plan, rank if count > 1 else None, port),
                stdin=subprocess.DEVNULL,
                stdout=logs[-1],
                stderr=subprocess.STDOUT,
            )
        )
    failed = [status for process in processes if (status := process.wait())]
    for log in logs:
        log.close()
    if not failed:
        return None
    message = f"Execution failed. User process exited with status code {failed[0]}."
    return {"code": "UserError", "message": message}


def _filled(command: str, values: dict[str, dict[str, str]]) -> str:
    """The command with inputs and outputs filled in; `$[[…]]` only where all of its are given."""

    def optional(match: re.Match[str]) -> str:
        used = _PLACE.findall(match.group(1))
        return match.group(1) if all(name in values[kind] for kind, name in used) else ""

    return _PLACE.sub(lambda m: values[m.group(1)][m.group(2)], _OPTIONAL.sub(optional, command))


def _variables(plan: JobPlan, rank: int | None, port: int) -> dict[str, str]:
    """What the service sets for a process of a job; ranks as `distribution: pytorch` has them."""
    parts = plan.workspace.split("/")
    variables = {
        **os.environ,
        "AZUREML_RUN_ID": plan.name,
        "AZUREML_EXPERIMENT_NAME": plan.experiment,
        "AZUREML_ARM_SUBSCRIPTION": parts[2],
        "AZUREML_ARM_RESOURCEGROUP": parts[4],
        "AZUREML_ARM_WORKSPACE_NAME": parts[8],
        "AZUREML_NODE_COUNT": str(plan.nodes),
        **{name: str(value) for name, value in plan.environment.items()},
    }
    if rank is not None:
        variables |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % plan.processes),
            "NODE_RANK": str(rank // plan.processes),
            "WORLD_SIZE": str(plan.nodes * plan.processes),
            "LOCAL_WORLD_SIZE": str(plan.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return variables


# --- chat_completion_pipeline: `phi3 train` on the tiny model ---

# The component's inputs that a recipe's `finetune` section has under the same name.
_FINETUNE: dict[str, Callable[[str], object]] = {
    "num_train_epochs": int,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "learning_rate": float,
    "lr_scheduler_type": str,
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "weight_decay": float,
    "seed": int,
}


def _run_pipeline(plan: JobPlan, inputs: dict[str, str], work: Path) -> dict[str, Path]:
    """Train as the inputs say; returns where each of the pipeline's outputs is."""
    weights = tiny_model.weights_in(tiny_model.make(Path(plan.catalogue)))
    assert weights is not None  # noqa: S101 - it was made with weights
    # A recipe with the component's inputs, and its defaults where there are none.
    values = {name: item.default for name, item in INPUTS.items() if item.default} | inputs
    shape = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    data: Json = {
        "train": values["train_file_path"],
        "max_length": shape["max_position_embeddings"],
    }
    if "validation_file_path" in values:
        data["validation"] = values["validation_file_path"]
    content = {
        "name": "pipeline",
        "model": {"name_or_path": str(weights)},
        "data": data,
        "finetune": {
            **{name: convert(values[name]) for name, convert in _FINETUNE.items()},
            "method": "lora" if values["apply_lora"] == "true" else "full",
            "num_threads": 1,
        },
    }
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    with plan.log("std_log.txt").open("wb") as log:
        model = tiny_model.train([str(recipe)], work / "runs", log)
    folders = {"mlflow_model_folder": work / "mlflow", "pytorch_model_folder": work / "pytorch"}
    tiny_model.as_mlflow(model, folders["mlflow_model_folder"])
    tiny_model.link(model, folders["pytorch_model_folder"])
    return {plan.bound[name]: path for name, path in folders.items() if name in plan.bound}
