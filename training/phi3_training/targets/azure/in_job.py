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

from ...errors import Phi3TrainingError, StageError
from ...manifests import BaseManifest, ModelManifest
from ...recipe import Recipe
from ...run import Run, write_atomically

# How lines of the log that are not plain text begin; `jobs.JobLog` reads them on the other side.
PROGRESS, ERROR = "phi3-progress ", "phi3-error "
MANIFESTS = "manifests"
# What goes back to the run folder, besides the manifests.
SMALL_FILES = ("evaluate", "finetune/loss.jsonl", "adapter", "adapters")
_BASE_WAIT = 7200.0  # seconds that a process waits for the one that downloads the weights


def main(argv: Sequence[str] | None = None) -> int:
    """Do the job's work; 1 and one line that names the reason when it cannot be done."""
    parser = argparse.ArgumentParser(description="The work of one command job.")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="fine-tune, measure, and save an MLflow model")
    train.set_defaults(work=run_train)
    evaluate = commands.add_parser("evaluate", help="measure a tuned model against its base")
    evaluate.set_defaults(work=run_evaluate)
    for command in (train, evaluate):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--recipe", type=Path, required=True)
        command.add_argument("--base", type=Path)
        command.add_argument("--run-output", type=Path, required=True)
    train.add_argument("--model-output", type=Path, required=True)
    evaluate.add_argument("--tuned", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        return int(args.work(args))
    except Phi3TrainingError as error:
        sys.stdout.write(f"{error}\n{ERROR}{json.dumps(str(error))}\n")
        sys.stdout.flush()
        return 1


def run_train(args: argparse.Namespace) -> int:
    """Fine-tune in every process; the main one measures and saves."""
    from ...finetune import sft

    recipe = read_recipe(args.recipe, args.data)
    run = _run_folder(args.data)
    progress = ProgressLines()
    _find_base(recipe, run, args.base, progress)
    manifest = sft.finetune(recipe, run, progress)
    if manifest is None:  # the main process of the job saves what all have learnt
        return 0
    run.write(manifest)
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
    progress = ProgressLines()
    _find_base(recipe, run, args.base, progress)
    tuned = weights_in(args.tuned, run.path / "tuned")
    run.write(ModelManifest(path=str(tuned)))
    _evaluate(recipe, run, args.recipe, progress)
    _hand_over(run, args.run_output)
    return 0


class ProgressLines:
    """Progress as lines of the log, at most one in a second."""

    # The log is uploaded as it grows, and read in full at each poll.

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
    """The recipe that was uploaded; its paths count from the folder of the chats."""
    content = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    for section, key in (("base", "data"), ("evaluate", "canary"), ("evaluate", "probes")):
        values = content.get(section)
        if values and values.get(key):
            values[key] = [str(folder / item) for item in values[key]]
    return Recipe.model_validate(content)


def _run_folder(data: Path) -> Run:
    """The run folder of this node: its processes share it, those of another node have their own."""
    # Azure ML sets AZUREML_RUN_ID to the job's name; a distributed job has NODE_RANK and LOCAL_RANK
    # in each process.
    name = os.environ.get("AZUREML_RUN_ID")
    node = os.environ.get("NODE_RANK", "0")
    if name:
        path = Path(tempfile.gettempdir()) / f"phi3-{name}-{node}" / "run"
    else:
        path = Path(tempfile.mkdtemp(prefix="phi3-")) / "run"
    run = Run.open(path)
    if _is_first_on_node():
        shutil.copytree(data / "data", run.path / "data", dirs_exist_ok=True)
    return run


def _is_first_on_node() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _find_base(recipe: Recipe, run: Run, uploaded: Path | None, progress: ProgressLines) -> None:
    """Find the base model once on each node; the other processes wait for its manifest."""
    from ...finetune import prepare_base

    failure = run.path / "base.failed"
    if not _is_first_on_node():
        ends = time.monotonic() + _BASE_WAIT
        while run.read(BaseManifest) is None:
            if failure.exists():
                raise StageError(failure.read_text(encoding="utf-8"))
            if time.monotonic() > ends:
                raise StageError("The base model was not ready in time; see the log of process 0")
            time.sleep(0.5)
        return
    failure.unlink(missing_ok=True)  # of an earlier try: Azure ML may restart a job on its machine
    try:
        if uploaded is None:
            manifest = prepare_base(recipe, run, progress)
        else:
            path = weights_in(uploaded, run.path / "base-model")
            manifest = BaseManifest(path=str(path), made="found", summary="the base model")
    except Phi3TrainingError as error:
        write_atomically(failure, str(error))
        raise
    folder = run.path / manifest.path
    # Hugging Face's cache names a snapshot's folder after the commit that it holds.
    revision = folder.name if folder.parent.name == "snapshots" else None
    run.write(manifest.model_copy(update={"revision": revision}))


def _evaluate(recipe: Recipe, run: Run, recipe_path: Path, progress: ProgressLines) -> None:
    """Measure; `asked` in the manifest says which questions the figures belong to."""
    from ...evaluate import evaluate

    asked = json.loads(recipe_path.read_text(encoding="utf-8"))["asked"]
    run.write(evaluate(recipe, run, progress).model_copy(update={"asked": asked}))


def _hand_over(run: Run, output: Path) -> None:
    """Copy the small files; the manifests last, so that where they are the rest is complete."""
    for name in SMALL_FILES:
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
    from ...packages import MODEL_PACKAGES
    from .environments import pinned

    weights = run.path / run.require(ModelManifest).path
    with tempfile.TemporaryDirectory(dir=run.path) as scratch:
        code = Path(scratch) / "code"
        copy_carried(code, mlflow_model.__name__)
        saved = Path(scratch) / "model"  # MLflow refuses a folder that exists, and `output` does
        mlflow.pyfunc.save_model(
            path=str(saved),
            python_model=str(mlflow_model.__file__),
            artifacts={"model": str(weights)},
            code_paths=[str(code / "phi3_training")],
            # Given, because MLflow's own guess loads the model in another process.
            pip_requirements=pinned(*MODEL_PACKAGES, "pydantic"),
            metadata={"made_by": "phi3-promptflow", "task": "chat-completion"},
        )
        shutil.copytree(saved, output, dirs_exist_ok=True)


def weights_in(folder: Path, work: Path) -> Path:
    """The Hugging Face folder in a model folder: itself, or what an MLflow model holds inside.

    Catalogue models keep weights and tokenizer apart; `work` then becomes both. Raises StageError.
    """
    # A catalogue model: data/model and data/tokenizer. One of our jobs: artifacts/model with both.
    weights = _topmost(folder, "config.json", together_with="*.safetensors")
    if weights is None:
        raise StageError(
            f"{folder.name} contains no weights: expected config.json and *.safetensors"
        )
    names = ("tokenizer.json", "tokenizer.model")
    if any((weights / name).is_file() for name in names):
        return weights
    tokenizer = next((path for name in names if (path := _topmost(folder, name))), None)
    if tokenizer is None:
        raise StageError(f"{folder.name} contains no tokenizer: expected tokenizer.json")
    work.mkdir(parents=True, exist_ok=True)
    for source in (tokenizer, weights):  # weights last: theirs is the config.json that counts
        for path in source.iterdir():
            if path.is_file():
                (work / path.name).unlink(missing_ok=True)
                (work / path.name).symlink_to(path.resolve())
    return work


def _topmost(folder: Path, name: str, together_with: str = "*") -> Path | None:
    """The topmost folder with a file `name` and one that matches `together_with`."""
    parents = [path.parent for path in folder.rglob(name) if any(path.parent.glob(together_with))]
    return min(parents, key=lambda path: len(path.parts), default=None)


if __name__ == "__main__":
    sys.exit(main())
