"""What goes up with a job: chats and recipe in one folder, our packages in another, and the pins.

Writes below <run>/azure/; the same content makes the same files, so that nothing goes up twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

import phi3_tool

from ...errors import StageError
from ...recipe import Recipe
from ...run import Run, fingerprint, sha256_of, write_atomically

PYTHON = "3.11"
ASKED = "asked.json"
PARTS = ("train", "validation", "replay")
_CODE = (".py", ".css", ".txt", ".yaml", ".typed")


def data_files(run: Run) -> dict[str, Path]:
    """The prepared chats by part. StageError where there are none."""
    run.require("dataset", "phi3 data prepare")
    found = {part: run.path / "data" / f"{part}.jsonl" for part in PARTS}
    return {part: path for part, path in found.items() if path.is_file()}


def stage_data(recipe: Recipe, run: Run, processes: int = 1) -> Path:
    """The folder that a job gets as its input `data`."""
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
    for part, key in (("canary", "canary"), ("probes", "probes")):
        paths = [path for name, path in extra if name == part]
        content["evaluate"][key] = _files(folder, part, paths)
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(folder / "recipe.json", text + "\n")
    write_atomically(folder / ASKED, json.dumps({"asked": _asked(recipe, folder)}) + "\n")
    return folder


def learnt_hash(folder: Path) -> str:
    """What of a staged folder the tuned model depends on."""
    return content_hash(folder, "data/*", "files/base-*")


def asked_in(folder: Path) -> str:
    """What an evaluation with a staged folder depends on, beside the model."""
    return str(json.loads((folder / ASKED).read_text(encoding="utf-8"))["asked"])


def _asked(recipe: Recipe, folder: Path) -> str:
    section = recipe.evaluate.model_dump(mode="json", exclude={"canary", "probes"})
    questions = content_hash(folder, "data/*", "files/canary-*", "files/probes-*")
    return fingerprint([section, recipe.ask, questions])


def content_hash(folder: Path, *patterns: str) -> str:
    """What the files of a folder that fit a pattern are, by name and content."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return fingerprint([[path.relative_to(folder).as_posix(), sha256_of(path)] for path in paths])


def stage_code(run: Run) -> Path:
    """The folder with our two packages, as this machine runs them."""
    folder = _fresh(run.path / "azure" / "code")
    ours = Path(str(files("phi3_training")))
    for package in (ours, Path(phi3_tool.__file__).parent):
        for path in sorted(package.rglob("*")):
            if path.suffix in _CODE and "__pycache__" not in path.parts:
                _copy(path, folder / package.name / path.relative_to(package))
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
