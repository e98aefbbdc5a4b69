"""The catalogue's foundation models as this machine has them: one tiny Phi-3, made when first used.

Made by `phi3 train` in a process of its own, from its default recipe; lies in catalogue/ of the
rehearsal's folder.
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

from filelock import FileLock

from .processes import RehearsalError, child_environment

_PRODUCT = "phi3_training.cli"


def make(folder: Path) -> Path:
    """The tiny model as an MLflow folder under `folder`, made once. Raises RehearsalError."""
    ready = folder / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not ready.is_dir():
            with (folder / "train.log").open("wb") as log:
                # Only the base counts; one epoch of fine-tuning is the least the command does.
                train(["finetune.num_train_epochs=1"], folder / "runs", log)
            part = folder / ".mlflow.part"
            shutil.rmtree(part, ignore_errors=True)
            as_mlflow(folder / "runs" / RUN / "base", part)
            part.replace(ready)
    return ready


RUN = "rehearsed"


def train(words: Sequence[str], runs: Path, log: IO[bytes]) -> Path:
    """Run `phi3 train`; the folder of the model that it made. Raises RehearsalError."""
    runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", _PRODUCT, "train", *words, "--run", RUN, "--runs", str(runs)]
    done = subprocess.run(  # noqa: S603 - a command of this machine, no shell
        command,
        cwd=runs,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise RehearsalError(f"phi3 train ended with exit status {done.returncode}; see {log.name}")
    manifest = json.loads((runs / RUN / "model.json").read_text(encoding="utf-8"))
    return runs / RUN / str(manifest["path"])


def as_mlflow(model: Path, target: Path) -> None:
    """Wrap a folder of weights as the MLflow model that the catalogue's converter writes."""
    shutil.copytree(model, target / "data" / "model")
    (target / "MLmodel").write_text(
        "flavors:\n"
        "  hftransformersv2:\n"
        "    code: null\n"
        "    model_data: data\n"
        "    task_type: chat-completion\n"
        "  python_function:\n"
        "    data: data\n"
        "    loader_module: azureml.evaluate.mlflow.hftransformers\n"
        "metadata:\n"
        "  azureml.base_image: mcr.microsoft.com/azureml/curated/foundation-model-inference:63\n",
        encoding="utf-8",
    )


def weights_in(folder: Path) -> Path | None:
    """The folder of weights inside an MLflow model (or the folder itself)."""
    found = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    with_weights = [p.parent for p in found if any(p.parent.glob("*.safetensors"))]
    return with_weights[0] if with_weights else None


def link(source: Path, target: Path) -> None:
    """Give a job a copy of `source` to read; of a big file a second name does."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
