"""What goes up with a job: the chats, the recipe, our packages, and the versions of others.

Writes below <run>/azure/; the same content makes the same files, so that nothing goes up twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ...carried import carried_files
from ...errors import StageError
from ...recipe import Recipe
from ...run import Run, fingerprint, sha256_of, write_atomically

PYTHON = "3.11"
PARTS = ("train", "validation", "replay")


def data_files(run: Run) -> dict[str, Path]:
    """The prepared chats by part. StageError where there are none."""
    run.require("dataset", "phi3 data prepare")
    found = {part: run.path / "data" / f"{part}.jsonl" for part in PARTS}
    return {part: path for part, path in found.items() if path.is_file()}


@dataclass(frozen=True)
class Staged:
    """What a job gets: a folder of chats, and beside it a recipe whose paths count from there.

    Apart, so that another learning rate does not send the chats up again.
    """

    data: Path
    recipe: Path
    learnt: str  # what of the chats the tuned model depends on
    asked: str  # what an evaluation depends on, beside the model


def stage(recipe: Recipe, run: Run, processes: int = 1) -> Staged:
    """Put together what goes up."""
    from ...evaluate.questions import extra_files

    folder = _fresh(run.path / "azure" / "data")
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude={"azure", "serve"})
    for part, path in data_files(run).items():
        _copy(path, folder / "data" / f"{part}.jsonl")
    content["data"] |= {
        "train": ["data/train.jsonl"],
        "validation": ["data/validation.jsonl"],
        "replay": [],
    }
    # The machine of the job starts one process for each GPU itself.
    content["finetune"] |= {"num_processes": processes, "num_machines": 1, "report_to": []}
    if recipe.base is not None:
        content["base"]["data"] = _files(folder, "base", recipe.base.data)
    if not recipe.model.is_tiny and Path(recipe.model.name_or_path).expanduser().is_dir():
        content["model"]["name_or_path"] = "base-model"  # goes up as an input of its own
    extra = extra_files(recipe.evaluate)
    for part in ("canary", "probes"):
        paths = [path for name, path in extra if name == part]
        content["evaluate"][part] = _files(folder, part, paths)
    asked = _asked(recipe, folder)
    path = run.file("azure", "recipe.json")
    text = json.dumps({"asked": asked, "recipe": content}, indent=1, sort_keys=True)
    write_atomically(path, text + "\n")
    return Staged(folder, path, content_hash(folder, "data/*", "files/base-*"), asked)


def _asked(recipe: Recipe, folder: Path) -> str:
    section = recipe.evaluate.model_dump(mode="json", exclude={"canary", "probes"})
    questions = content_hash(folder, "data/*", "files/canary-*", "files/probes-*")
    return fingerprint([section, recipe.ask, questions])


def content_hash(folder: Path, *patterns: str) -> str:
    """What the files of a folder that fit a pattern are, by name and content."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return fingerprint([[path.relative_to(folder).as_posix(), sha256_of(path)] for path in paths])


def stage_code(run: Run) -> Path:
    """The folder with what of our packages the job runs, as this machine has it."""
    folder = _fresh(run.path / "azure" / "code")
    for name, path in carried_files("phi3_training.targets.azure.in_job").items():
        _copy(path, folder / name)
    return folder


def conda_file(recipe: Recipe, run: Run) -> tuple[Path, str]:
    """The job's packages in the versions that were tested, and a version made from them."""
    pins = [line for line in _pins() if line and not line.startswith("#")]
    if recipe.finetune.method == "qlora":
        pins.append("bitsandbytes>=0.46")
    content = {
        "name": "phi3",
        "channels": ["conda-forge"],
        "dependencies": [f"python={PYTHON}", "pip", {"pip": pins}],
    }
    text = yaml.safe_dump(content, sort_keys=False)
    path = run.file("azure", "conda.yaml")
    write_atomically(path, text)
    image = recipe.azure.train.environment.image
    return path, hashlib.sha256(f"{image}\n{text}".encode()).hexdigest()[:12]


def _pins() -> list[str]:
    text = files("phi3_training.targets.azure").joinpath("trainer.txt").read_text("utf-8")
    return [line.strip() for line in text.splitlines()]


def _files(folder: Path, part: str, paths: Iterable[Path]) -> list[str]:
    names = []
    for number, path in enumerate(paths):
        name = f"files/{part}-{number}{path.suffix}"
        _copy(path, folder / name)
        names.append(name)
    return names


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise StageError(
            f"{source} cannot be copied for the job: {error.strerror}; "
            "make room or set rights there, then type the same command again"
        ) from None
