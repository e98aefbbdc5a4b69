"""The model used for every foundation model of the catalogue: a tiny Phi-3, trained on first use.

Created by `phi3 train tiny` in a separate process; stored in catalogue/ of the rehearsal's folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import yaml
from filelock import FileLock

from .processes import RehearsalError, child_environment

_RUN = "rehearsed"
_RECIPE = "tiny"  # named: the default recipe's base is a pretrained model, fetched and much larger


def folder_in(catalogue: Path) -> Path:
    """Where the model is, or will be once it is trained."""
    return catalogue / "mlflow"


def make(catalogue: Path) -> Path:
    """The model as an MLflow folder, made once (half a minute). Raises RehearsalError."""
    ready = folder_in(catalogue)
    catalogue.mkdir(parents=True, exist_ok=True)
    with FileLock(catalogue / ".lock"):
        if not ready.is_dir():
            with (catalogue / "train.log").open("wb") as log:
                # Only the base counts; one epoch of fine-tuning is the least the command does.
                train([_RECIPE, "finetune.num_train_epochs=1"], catalogue / "runs", log)
            part = catalogue / ".mlflow.part"
            shutil.rmtree(part, ignore_errors=True)
            as_mlflow(catalogue / "runs" / _RUN / "base", part)
            part.replace(ready)
    return ready


def train(words: Sequence[str], runs: Path, log: IO[bytes]) -> Path:
    """Run `phi3 train`; the folder of the model that it made. Raises RehearsalError."""
    runs.mkdir(parents=True, exist_ok=True)
    own = ("--run", _RUN, "--runs", str(runs))
    done = subprocess.run(  # noqa: S603 - a program of this machine, no shell
        [sys.executable, "-m", "phi3_training.cli", "train", *words, *own],
        cwd=runs,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise RehearsalError(f"phi3 train ended with exit status {done.returncode}; see {log.name}")
    manifest = json.loads((runs / _RUN / "model.json").read_text(encoding="utf-8"))
    return runs / _RUN / str(manifest["path"])


def as_mlflow(model: Path, target: Path) -> None:
    """Wrap a folder of weights as the MLflow model that the catalogue's converter writes."""
    shutil.copytree(model, target / "data" / "model")
    # The image that the catalogue's Phi-3-mini names: its server is the one phi3 imitates.
    image = "mcr.microsoft.com/azureml/curated/foundation-model-inference:63"
    transformers = {"code": None, "model_data": "data", "task_type": "chat-completion"}
    loader = {"data": "data", "loader_module": "azureml.evaluate.mlflow.hftransformers"}
    flavors = {"hftransformersv2": transformers, "python_function": loader}
    content = {"flavors": flavors, "metadata": {"azureml.base_image": image}}
    (target / "MLmodel").write_text(yaml.safe_dump(content), encoding="utf-8")


def weights_in(folder: Path) -> Path | None:
    """The folder of weights inside an MLflow model (or the folder itself), the uppermost one."""
    configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    return next((p.parent for p in configs if any(p.parent.glob("*.safetensors"))), None)


def link(source: Path, target: Path) -> None:
    """Give a job files to read under another name; a big file is not copied where links work."""

    def link_file(old: str, new: str) -> str:
        try:
            os.link(old, new)
        except OSError:  # another file system
            shutil.copy2(old, new)
        return new

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_file, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        link_file(str(source), str(target))
