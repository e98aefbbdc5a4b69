"""Carries one job out: `python -m phi3_rehearsal job FOLDER`.

Reads FOLDER/job.json; writes FOLDER/status.json, the job's logs and outputs below blobs/, and
works in FOLDER/work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

from . import tiny_model
from .cloud import now
from .offers import INPUTS
from .processes import RehearsalError, free_port, write_atomically
from .wire import Json

_PLACE = re.compile(r"\$\{\{(inputs|outputs)\.([\w-]+)\}\}")
_OPTIONAL = re.compile(r"\$\[\[(.*?)\]\]", re.DOTALL)


def run_job(folder: Path) -> int:
    """Run the job; its end is in status.json whatever happens."""
    job: Json = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    times = {"start": now()}
    _tell(folder, "Running", times)
    try:
        error = _run(folder, job)
    except (RehearsalError, OSError) as problem:
        error = {"code": "UserError", "message": str(problem)}
    times["end"] = now()
    if error:
        _tell(folder, "Failed", times, error)
        return 1
    _tell(folder, "Completed", times)
    return 0


def _tell(folder: Path, status: str, times: Json, error: Json | None = None) -> None:
    said = {"status": status, **times, **({"error": error} if error else {})}
    write_atomically(folder / "status.json", json.dumps(said))


def _run(folder: Path, job: Json) -> Json | None:
    time.sleep(job["slow"])
    if job["fail"]:
        log = _log_file(job, "std_log.txt")
        log.write_text(f"{job['fail']['code']}: {job['fail']['message']}\n", encoding="utf-8")
        return dict(job["fail"])
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    inputs = _inputs(job, work)
    if job["kind"] == "pipeline":
        outputs = _run_pipeline(job, inputs, work, _log_file)
    else:
        outputs = {name: work / "outputs" / name for name in job["outputs"]}
        for place in outputs.values():
            place.mkdir(parents=True)
        error = _command(job, inputs, outputs, work)
        if error:
            return error
    for name, place in outputs.items():
        tiny_model.link(place, Path(job["outputs"][name]))
    shutil.rmtree(work)
    return None


def _inputs(job: Json, work: Path) -> dict[str, str]:
    """Each input as the text that stands for it: a value, or where its copy lies."""
    found = {}
    for name, item in job["inputs"].items():
        if "literal" in item:
            found[name] = item["literal"]
            continue
        source = Path(item["path"])
        if source == Path(job["catalogue"]) / "mlflow":
            tiny_model.make(Path(job["catalogue"]))
        target = work / "inputs" / name / source.name
        tiny_model.link(source, target)
        found[name] = str(target)
    return found


def _log_file(job: Json, name: str) -> Path:
    path = Path(job["artifacts"]) / "user_logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _command(
    job: Json, inputs: dict[str, str], outputs: dict[str, Path], work: Path
) -> Json | None:
    """Run the command in every process of every node; the error of the first that fails."""
    code = work / "code"
    if job["code"]:
        tiny_model.link(Path(job["code"]), code)
    code.mkdir(exist_ok=True)
    text = _filled(job["command"], {**inputs}, {k: str(v) for k, v in outputs.items()})
    count = job["nodes"] * job["processes"]
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    for rank in range(count):
        name = "std_log.txt" if count == 1 else f"std_log_process_{rank:02d}.txt"
        log: IO[bytes] = _log_file(job, name).open("wb")
        logs.append(log)
        environment = _environment(job, rank, port) if count > 1 else _environment(job)
        processes.append(
            subprocess.Popen(  # noqa: S603 - the user's own command, as on Azure
                ["/bin/bash", "-c", text],
                cwd=code,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    codes = [process.wait() for process in processes]
    for log in logs:
        log.close()
    failed = [code for code in codes if code]
    if not failed:
        return None
    message = f"Execution failed. User process exited with status code {failed[0]}."
    return {"code": "UserError", "message": message}


def _filled(command: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    """The command with inputs and outputs in place; optional parts only where they are given."""

    def optional(match: re.Match[str]) -> str:
        used = [name for _kind, name in _PLACE.findall(match.group(1))]
        return match.group(1) if all(name in {**inputs, **outputs} for name in used) else ""

    def value(match: re.Match[str]) -> str:
        return (inputs if match.group(1) == "inputs" else outputs)[match.group(2)]

    return _PLACE.sub(value, _OPTIONAL.sub(optional, command))


def _environment(job: Json, rank: int | None = None, port: int = 0) -> dict[str, str]:
    """What the service sets for a process of a job."""
    parts = job["workspace"].split("/")
    found = {
        **os.environ,
        "AZUREML_RUN_ID": job["name"],
        "AZUREML_EXPERIMENT_NAME": job["experiment"],
        "AZUREML_ARM_SUBSCRIPTION": parts[2],
        "AZUREML_ARM_RESOURCEGROUP": parts[4],
        "AZUREML_ARM_WORKSPACE_NAME": parts[8],
        "AZUREML_NODE_COUNT": str(job["nodes"]),
        **{name: str(value) for name, value in job["environment"].items()},
    }
    if rank is not None:
        found |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % job["processes"]),
            "NODE_RANK": str(rank // job["processes"]),
            "WORLD_SIZE": str(job["nodes"] * job["processes"]),
            "LOCAL_WORLD_SIZE": str(job["processes"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    return found


# --- chat_completion_pipeline: `phi3 train` on the tiny model ---

# The component's names that a recipe's `finetune` section has as well.
_SAME: dict[str, Callable[[str], Any]] = {
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


def _run_pipeline(
    job: Json, inputs: dict[str, str], work: Path, log_file: Callable[[Json, str], Path]
) -> dict[str, Path]:
    """Train as the inputs say; where each of the pipeline's outputs lies."""
    weights = tiny_model.weights_in(tiny_model.make(Path(job["catalogue"])))
    assert weights is not None  # noqa: S101 - we made it
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(inputs, weights)), encoding="utf-8")
    with log_file(job, "std_log.txt").open("wb") as log:
        model = tiny_model.train([str(recipe)], work / "runs", log)
    folders = {"mlflow_model_folder": work / "mlflow", "pytorch_model_folder": work / "pytorch"}
    tiny_model.as_mlflow(model, folders["mlflow_model_folder"])
    tiny_model.link(model, folders["pytorch_model_folder"])
    return {job["bound"][name]: path for name, path in folders.items() if name in job["bound"]}


def _recipe(inputs: dict[str, str], weights: Path) -> Json:
    """A recipe with the component's inputs, and its defaults where there are none."""
    values = {name: item.default for name, item in INPUTS.items() if item.default} | inputs
    tuned = {name: kind(values[name]) for name, kind in _SAME.items() if name in values}
    tuned["method"] = "lora" if values["apply_lora"] == "true" else "full"
    tuned["num_threads"] = 1
    shape = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    data: Json = {
        "train": values["train_file_path"],
        "max_length": shape["max_position_embeddings"],
    }
    if "validation_file_path" in values:
        data["validation"] = values["validation_file_path"]
    return {
        "name": "pipeline",
        "model": {"name_or_path": str(weights)},
        "data": data,
        "finetune": tuned,
    }
