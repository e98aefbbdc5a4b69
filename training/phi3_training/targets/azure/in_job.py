"""Runs inside an Azure ML command job: fine-tunes and measures with our own trainer.

Reads the uploaded chats and recipe; writes the run's small files and an MLflow model into the job's
outputs. Needs no azure package. `python -m phi3_training.targets.azure.in_job --help`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import Phi3TrainingError, StageError
from ...recipe import Recipe
from ...run import Run, write_atomically

PROGRESS, ERROR = "phi3-progress ", "phi3-error "
MANIFESTS = "manifests"
# What goes back to the run folder, beside the manifests.
SMALL = ("evaluate", "finetune/loss.jsonl", "adapter", "adapters")
_BASE_WAIT = 7200.0  # seconds that a process waits for the one that fetches the weights


def main(argv: Sequence[str] | None = None) -> int:
    """Do the job's work; 1 and one line that names the reason when it cannot be done."""
    args = _parser().parse_args(argv)
    try:
        return int(args.work(args))
    except Phi3TrainingError as error:
        sys.stdout.write(f"{error}\n{ERROR}{json.dumps(str(error))}\n")
        sys.stdout.flush()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The work of one command job.")
    inner = parser.add_subparsers(required=True)
    train = inner.add_parser("train", help="fine-tune, measure, and save an MLflow model")
    train.add_argument("--data", type=Path, required=True)
    train.add_argument("--recipe", type=Path, required=True)
    train.add_argument("--base", type=Path)
    train.add_argument("--run-output", type=Path, required=True)
    train.add_argument("--model-output", type=Path, required=True)
    train.set_defaults(work=run_train)
    measure = inner.add_parser("evaluate", help="measure a tuned model against its base")
    measure.add_argument("--data", type=Path, required=True)
    measure.add_argument("--recipe", type=Path, required=True)
    measure.add_argument("--tuned", type=Path, required=True)
    measure.add_argument("--base", type=Path)
    measure.add_argument("--run-output", type=Path, required=True)
    measure.set_defaults(work=run_evaluate)
    return parser


def run_train(args: argparse.Namespace) -> int:
    """Fine-tune in every process; the main one measures and saves."""
    from ...finetune import sft

    recipe = read_recipe(args.recipe, args.data)
    run = _run_folder(args.data)
    progress = Told()
    _base(recipe, run, args.base, progress)
    made = sft.finetune(recipe, run, progress)
    if made is None:  # another process of the job saves what all have learnt
        return 0
    run.write_manifest("model", made)
    _evaluate(recipe, run, args.recipe, progress)
    _hand_over(run, args.run_output)
    progress(0, 0, "saving the MLflow model", always=True)
    _save_model(run, args.model_output)
    progress(0, 0, "done", always=True)
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure a model that another job has tuned."""
    recipe = read_recipe(args.recipe, args.data)
    run = _run_folder(args.data)
    progress = Told()
    _base(recipe, run, args.base, progress)
    tuned = weights_in(args.tuned, run.path / "tuned")
    run.write_manifest("model", {"path": str(tuned)})
    _evaluate(recipe, run, args.recipe, progress)
    _hand_over(run, args.run_output)
    return 0


class Told:
    """Progress as lines of the log, at most one in a second."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, done: int, total: int, text: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if not always and now - self._last < 1.0 and (not total or done < total):
            return
        self._last = now
        sys.stdout.write(f"{PROGRESS}{json.dumps([done, total, text])}\n")
        sys.stdout.flush()


def read_recipe(path: Path, folder: Path) -> Recipe:
    """The recipe that was sent along; its paths count from the folder of the chats."""
    content = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    for section, key in (("base", "data"), ("evaluate", "canary"), ("evaluate", "probes")):
        values = content.get(section)
        if values and values.get(key):
            values[key] = [str(folder / item) for item in values[key]]
    return Recipe.model_validate(content)


def _run_folder(data: Path) -> Run:
    """The run folder of this node: its processes share it, those of another node have their own."""
    name = os.environ.get("AZUREML_RUN_ID")
    node = os.environ.get("NODE_RANK", "0")
    if name:
        path = Path(tempfile.gettempdir()) / f"phi3-{name}-{node}" / "run"
    else:
        path = Path(tempfile.mkdtemp(prefix="phi3-")) / "run"
    run = Run.open(path)
    if _leads_node():
        shutil.copytree(data / "data", run.path / "data", dirs_exist_ok=True)
    return run


def _leads_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _base(recipe: Recipe, run: Run, given: Path | None, progress: Told) -> None:
    """Find the base model once on each node; the other processes wait for that."""
    from ...finetune import prepare_base

    failed = run.path / "base.failed"
    if not _leads_node():
        _await_base(run, failed)
        return
    failed.unlink(missing_ok=True)  # of a try before this one
    try:
        if given is not None:
            path = weights_in(given, run.path / "base-model")
            made: dict[str, Any] = {"path": str(path), "made": "found", "summary": "the base model"}
        else:
            made = prepare_base(recipe, run, progress)
    except Phi3TrainingError as error:
        write_atomically(failed, str(error))
        raise
    folder = run.path / str(made["path"])
    # Hugging Face's cache names a folder after the commit that it holds.
    revision = folder.name if folder.parent.name == "snapshots" else None
    run.write_manifest("base", {**made, "revision": revision})


def _await_base(run: Run, failed: Path) -> None:
    ends = time.monotonic() + _BASE_WAIT
    while run.manifest("base") is None:
        if failed.exists():
            raise StageError(failed.read_text(encoding="utf-8"))
        if time.monotonic() > ends:
            raise StageError("The base model was not there in time; see the log of process 0")
        time.sleep(0.5)


def _evaluate(recipe: Recipe, run: Run, path: Path, progress: Told) -> None:
    """Measure; `asked` in the manifest says which questions the figures belong to."""
    from ...evaluate import evaluate

    asked = json.loads(path.read_text(encoding="utf-8"))["asked"]
    run.write_manifest("metrics", {**evaluate(recipe, run, progress), "asked": asked})


def _hand_over(run: Run, output: Path) -> None:
    """Copy the small files; the manifests last, so that they are whole when they are there."""
    for name in SMALL:
        source = run.path / name
        if source.is_dir():
            shutil.copytree(source, output / name, dirs_exist_ok=True)
        elif source.is_file():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, output / name)
    for path in sorted(run.path.glob("*.json")):
        (output / MANIFESTS).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output / MANIFESTS / path.name)


def _save_model(run: Run, output: Path) -> None:
    """The merged model as an MLflow model that loads without this project installed."""
    import mlflow

    from phi3_training import mlflow_model

    from ...carried import copy_carried
    from ...register import MLFLOW_MODEL, REQUIREMENTS

    model = run.path / str(run.require("model", "the job's training")["path"])
    with tempfile.TemporaryDirectory(dir=run.path) as folder:
        made, code = Path(folder) / "model", Path(folder) / "code"
        copy_carried(code, MLFLOW_MODEL)
        mlflow.pyfunc.save_model(
            path=str(made),
            python_model=str(mlflow_model.__file__),
            artifacts={"model": str(model)},
            code_paths=[str(code / "phi3_training")],
            pip_requirements=[*REQUIREMENTS, "pydantic>=2.11"],
            metadata={"made_by": "phi3-promptflow", "task": "chat-completion"},
        )
        shutil.copytree(made, output, dirs_exist_ok=True)


def weights_in(folder: Path, work: Path) -> Path:
    """The Hugging Face folder in a model folder: itself, or what an MLflow model holds inside.

    Catalogue models keep weights and tokenizer apart; `work` then becomes both. Raises StageError.
    """
    weights = _first(folder, ("*.safetensors",), "config.json")
    if weights is None:
        raise StageError(f"{folder.name} holds no weights: expected config.json and *.safetensors")
    names = ("tokenizer.json", "tokenizer.model")
    if any((weights / name).is_file() for name in names):
        return weights
    tokens = next((found for name in names if (found := _first(folder, (), name))), None)
    if tokens is None:
        raise StageError(f"{folder.name} holds no tokenizer: expected tokenizer.json")
    work.mkdir(parents=True, exist_ok=True)
    for source in (tokens, weights):  # weights last: their config.json counts
        for path in source.iterdir():
            if path.is_file():
                (work / path.name).unlink(missing_ok=True)
                (work / path.name).symlink_to(path.resolve())
    return work


def _first(folder: Path, beside: Sequence[str], name: str) -> Path | None:
    """The uppermost folder with a file `name` and files that fit `beside`."""
    found = [
        path.parent
        for path in folder.rglob(name)
        if all(any(path.parent.glob(pattern)) for pattern in beside)
    ]
    return min(found, key=lambda path: len(path.parts), default=None)


if __name__ == "__main__":
    sys.exit(main())
