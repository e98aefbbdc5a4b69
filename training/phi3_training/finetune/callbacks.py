"""What happens during a training: losses logged and watched, checkpoints, trackers.

Callbacks of the trainer. They append to run/finetune/loss.jsonl and eval.jsonl, seal, find and
remove run/finetune/checkpoints/<id>/checkpoint-<step>/, and send figures to TensorBoard
(run/tensorboard) or MLflow (run/mlflow.db).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import MissingExtraError
from ..mlflow_store import experiment_of, quiet_mlflow
from ..progress import Progress
from ..recipe import FinetuneSection, Recipe
from ..run import Run, fingerprint, sha256_of, write_atomically
from .runtime import Runtime, is_main_process, trim
from .trainer import Rows

# Watches the loss on held-out chats while training: stops when it no longer falls, keeps the best.
# Writes run/finetune/eval.jsonl and run/finetune/best.safetensors (the learning weights only).


class Validation(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Logs each evaluation; with `patience`, ends after this many without a better one.

    A training that resumes from a checkpoint continues with what the files say.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self._log = folder / "eval.jsonl"
        self._weights = folder / "best.safetensors"
        self._patience = patience
        self.losses: list[tuple[int, float]] = []
        self.stopped = False

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the least loss, and that loss."""
        return min(self.losses, key=lambda entry: entry[1], default=None)

    def on_train_begin(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        **_kwargs: object,
    ) -> None:
        """Start over, or with the evaluations before the checkpoint."""
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.is_file() else []
        entries = [json.loads(line) for line in lines]
        self.losses = [(e["step"], e["loss"]) for e in entries if e["step"] <= state.global_step]
        if state.is_world_process_zero:
            self._write()
            if not self.losses:
                self._weights.unlink(missing_ok=True)

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: PreTrainedModel = None,
        **_kwargs: object,
    ) -> None:
        """Called by the trainer after each evaluation."""
        self.losses.append((state.global_step, float(metrics["eval_loss"])))
        best = self.best
        better = best == self.losses[-1]
        if state.is_world_process_zero:
            self._write()
            if better and self._patience:
                learning = {
                    name: weight.detach().to("cpu", copy=True).contiguous()
                    for name, weight in model.named_parameters()
                    if weight.requires_grad and weight.dtype != torch.uint8
                }
                temporary = self._weights.with_name(f".{self._weights.name}")
                save_file(learning, temporary)
                temporary.replace(self._weights)
        steps = [step for step, _ in self.losses]
        since = len(steps) - 1 - steps.index(best[0]) if best else 0
        if self._patience and since >= self._patience:
            self.stopped = control.should_training_stop = True

    def restore(self, model: PreTrainedModel) -> str | None:
        """Give `model` the best weights back; says so, or None when nothing is to be done."""
        best = self.best
        if not self._patience or best is None or not self._weights.is_file():
            return None
        model.load_state_dict(load_file(self._weights), strict=False)
        why = f"no better in {self._patience} evaluations" if self.stopped else "the best of all"
        return f"using the weights of step {best[0]}: held-out loss {best[1]:.3f}, {why}"

    def clear(self) -> None:
        """Remove the kept weights, once the model is written."""
        self._weights.unlink(missing_ok=True)

    def _write(self) -> None:
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in self.losses]
        self._log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class LossLog(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Writes each step's loss as a JSON line and reports to the caller how far training is."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.losses: list[float] = []
        self._progress = progress

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Start over, or with the steps before the checkpoint that training resumes from."""
        entries = [entry for entry in state.log_history if "loss" in entry]
        self.losses = [float(entry["loss"]) for entry in entries]
        if state.is_world_process_zero:
            text = "".join(_line(e["step"], e["epoch"], e) for e in entries)
            write_atomically(self.path, text)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_kwargs: object,
    ) -> None:
        """Called by the trainer after each step with its figures."""
        if not logs or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(state.global_step, float(state.epoch or 0.0), logs))
        epoch = f"epoch {int(state.epoch or 0) + 1}"
        self._progress(state.global_step, state.max_steps, f"{epoch}, loss {self.losses[-1]:.3f}")


# A tenth of a second for about twenty seconds of training on two cores.
_TRIM_STEPS = 10


class TrimHeap(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Gives freed memory back during a training on the CPU; see runtime.py."""

    def on_step_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Called by the trainer after each step."""
        if state.global_step % _TRIM_STEPS == 0:
            trim()


def _line(step: int, epoch: float, logs: dict[str, float]) -> str:
    line = {
        "step": step,
        "epoch": round(epoch, 4),
        "loss": float(logs["loss"]),
        "token_accuracy": logs.get("mean_token_accuracy"),
        "learning_rate": logs.get("learning_rate"),
    }
    return json.dumps(line) + "\n"


# Checkpoints: atomic, and only for the training they belong to. The trainer writes them (weights
# that learn, optimiser, schedule, random states, position in the data, log); here they are sealed,
# found and removed.

SEAL = "whole.json"
# Saving by time takes at most one part in 20 of the time.
_SPARING = 20
# What may change between two attempts at one training.
_OF_NO_ACCOUNT = {
    "num_threads",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "report_to",
    "allow",
    "save_steps",
    "save_seconds",
    "save_total_limit",
}


def training_id(settings: FinetuneSection, runtime: Runtime, rows: Rows, base: Path) -> str:
    """What a checkpoint belongs to: settings, encoded rows in their order, and base weights."""
    data = hashlib.sha256(str(rows.limit).encode())
    for part in (rows.train, rows.validation):
        for example in part:
            data.update(json.dumps([example.input_ids, example.assistant_mask]).encode())
        data.update(b"\n")
    files = [base / "config.json", *sorted(base.glob("*.safetensors"))]
    weights = [sha256_of(path) for path in files]
    chosen = settings.model_dump(mode="json", exclude=_OF_NO_ACCOUNT)
    kind = [runtime.device, runtime.dtype, runtime.frozen]
    return fingerprint([chosen, *kind, data.hexdigest(), weights])


class Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Says when to save, seals what was saved, and makes each epoch's order repeatable."""

    def __init__(
        self, run: Path, settings: FinetuneSection, runtime: Runtime, rows: Rows, base: Path
    ) -> None:
        self._root = run / "finetune" / "checkpoints"
        self._settings = settings
        self._saved_at = time.monotonic()
        self._began = 0.0
        self._cost = 0.0
        self.folder = self._root / training_id(settings, runtime, rows, base)
        self.resumed_at: int | None = None

    def newest(self) -> Path | None:
        """The newest complete checkpoint of this training that every process sees; or None.

        What a killed process left unfinished is removed.
        """
        checkpoints = {_step(path): path for path in self.folder.glob("checkpoint-*")}
        steps: set[int] = set()
        for step, path in checkpoints.items():
            # Complete: the list exists, and every file on it with the recorded length.
            try:
                sizes = json.loads((path / SEAL).read_text(encoding="utf-8"))["files"].items()
                if all((path / name).stat().st_size == size for name, size in sizes):
                    steps.add(step)
            except (OSError, ValueError, KeyError):
                continue
        if is_main_process():
            for step in checkpoints.keys() - steps:
                shutil.rmtree(checkpoints[step])
        if distributed.is_initialized():  # processes resume at one step, or exchange nonsense
            gathered: list[set[int]] = [set() for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(gathered, steps)
            steps = set.intersection(*gathered)
        self.resumed_at = max(steps, default=None)
        return None if self.resumed_at is None else checkpoints[self.resumed_at]

    def choices(self) -> list[str]:
        """What a person should know: where training resumed."""
        if self.resumed_at is None:
            return []
        return [f"Resumed from checkpoint at step {self.resumed_at}"]

    def clear(self) -> None:
        """Remove all checkpoints, once the model is written."""
        if self._root.exists():
            shutil.rmtree(self._root)

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Start the save timer here: loading a model is not progress to be saved."""
        self._saved_at = time.monotonic()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        train_dataloader: Any = None,
        **_: object,
    ) -> None:
        """Draw the epoch's order from its number.

        The library draws it from torch's global state, which is another one when training goes
        on in the middle of an epoch: rows would be seen twice and others never.
        """
        batches = train_dataloader.batch_sampler
        batches = getattr(batches, "batch_sampler", batches)  # a process's share of the batches
        sampler = getattr(batches, "sampler", None)
        if not isinstance(sampler, LengthGroupedSampler):
            raise TypeError(f"the order of {type(sampler).__name__} cannot be repeated")
        seed = int(fingerprint([args.data_seed or args.seed, int(state.epoch or 0)])[:15], 16)
        sampler.generator = torch.Generator().manual_seed(seed)

    def on_step_end(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: object,
    ) -> None:
        """Ask for a checkpoint when one is due, and a last one where there is one already."""
        every = self._settings.save_steps
        due = every is not None and state.global_step % every == 0
        if state.global_step >= state.max_steps:
            due = due or any(self.folder.glob("checkpoint-*"))
        elif self._settings.save_seconds is not None and not due:
            since = time.monotonic() - self._saved_at
            due = since >= max(self._settings.save_seconds, _SPARING * self._cost)
            if distributed.is_initialized():
                # Clocks differ and all must save together: the first process decides. Asking takes
                # time, so it is done at every tenth step.
                answer = [due]
                if state.global_step % 10 == 0:
                    distributed.broadcast_object_list(answer, src=0)
                due = answer[0] and state.global_step % 10 == 0
        if due:
            control.should_save = True
            self._began = time.monotonic()

    def on_save(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        **_: object,
    ) -> None:
        """Seal the checkpoint that was just written, then remove old ones."""
        if distributed.is_initialized():
            distributed.barrier()  # each process writes its own random states
        if is_main_process():
            seal(self.folder / f"checkpoint-{state.global_step}", state.global_step)
            limit = self._settings.save_total_limit
            for path in sorted(self.folder.glob("checkpoint-*"), key=_step)[:-limit]:
                shutil.rmtree(path)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - self._began


def seal(folder: Path, step: int) -> None:
    """Mark a checkpoint as complete: first every byte on disk, then the list of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in [*files, folder, folder.parent]:
        _sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_atomically(folder / SEAL, json.dumps({"step": step, "files": sizes}, indent=2) + "\n")
    _sync(folder)


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# The figures of a training in TensorBoard or MLflow while it runs. Next to the checkpoints is the
# id of the MLflow run: an interrupted training resumes in it.

_MLFLOW_ID = "mlflow-run"
_BATCH = 100  # figures per write: sqlite takes as long for one as for a hundred


def trackers(recipe: Recipe, run: Run, checkpoints: Path) -> list[TrainerCallback]:
    """A callback for each name in `finetune.report_to`; MissingExtraError without its package.

    `checkpoints` is the folder of this training's own, that goes when the training is done.
    """
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in recipe.finetune.report_to:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtraError("tensorboard", "tensorboard")
        callbacks.append(_TensorBoard(run))
    if "mlflow" in recipe.finetune.report_to:
        if importlib.util.find_spec("mlflow") is None:
            raise MissingExtraError("mlflow", "local")
        callbacks.append(_MLflow(recipe, run, checkpoints / _MLFLOW_ID))
    return callbacks


class _Tracker(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Hands over what the main process logs."""

    def begin(self, step: int) -> None: ...
    def figures(self, step: int, figures: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def end(self) -> None: ...

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Open the store."""
        if state.is_world_process_zero:
            self.begin(state.global_step)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Called by the trainer with each step's figures."""
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if state.is_world_process_zero and numbers:
            self.figures(state.global_step, numbers)

    def on_save(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """A training resumed from this checkpoint does not log the earlier steps again."""
        if state.is_world_process_zero:
            self.flush()

    def on_train_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Write what is left and close."""
        if state.is_world_process_zero:
            self.end()


class _TensorBoard(_Tracker):
    def __init__(self, run: Run) -> None:
        self._folder = run.path / "tensorboard"

    def begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Later steps that an earlier process wrote are no longer shown: one series, no zigzag.
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()


class _MLflow(_Tracker):
    """A run `NAME finetune` in the store that the register stage uses as well."""

    def __init__(self, recipe: Recipe, run: Run, kept: Path) -> None:
        self._recipe, self._run = recipe, run
        self._kept = kept  # the file with the id
        self._waiting: list[Any] = []
        self._logged: dict[str, int] = {}  # the last step of each figure

    def begin(self, _step: int) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        with quiet_mlflow():
            self._client, experiment = experiment_of(self._recipe.name, self._run)
            # The MLflow run of an interrupted training is resumed, unless its store was removed.
            known = None
            if self._kept.is_file():
                self._id = self._kept.read_text(encoding="utf-8")
                with suppress(MlflowException):
                    known = self._client.get_run(self._id)
            if known is not None:
                for name in known.data.metrics:
                    history = self._client.get_metric_history(self._id, name)
                    self._logged[name] = max(entry.step for entry in history)
                self._client.update_run(self._id, status="RUNNING")
            else:
                name = f"{self._run.name} finetune"
                self._id = self._client.create_run(experiment, run_name=name).info.run_id
                write_atomically(self._kept, self._id)
                # Every MLflow store takes 500 characters; Azure ML's refuses longer ones.
                settings = self._recipe.finetune.model_dump(mode="json").items()
                params = [Param(key, str(value)[:500]) for key, value in settings]
                self._client.log_batch(self._id, params=params)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # Steps that the previous process did after the checkpoint are repeated with equal values.
        self._waiting += [
            Metric(name, value, now, step)
            for name, value in figures.items()
            if step > self._logged.get(name, -1)
        ]
        if len(self._waiting) >= _BATCH:
            self.flush()

    def end(self) -> None:
        self.flush()
        with quiet_mlflow():
            self._client.set_terminated(self._id)

    def flush(self) -> None:
        with quiet_mlflow():
            self._client.log_batch(self._id, metrics=self._waiting)
        self._waiting = []
