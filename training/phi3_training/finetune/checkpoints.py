"""Checkpoints of a fine-tuning: atomic, and only for the training they belong to.

The trainer writes run/finetune/checkpoints/<id>/checkpoint-<step>/ (weights that learn, optimiser,
schedule, random states, position in the data, log); here they are sealed, found and removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..recipe import FinetuneSection
from ..run import fingerprint, sha256_of, write_atomically
from .runtime import Runtime, is_main_process
from .trainer import Rows

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
        whole = {step for step, path in checkpoints.items() if _is_whole(path)}
        if is_main_process():
            for step in checkpoints.keys() - whole:
                shutil.rmtree(checkpoints[step])
        steps = _common(whole)
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

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the save timer here: loading a model is not progress to be saved."""
        self._saved_at = time.monotonic()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
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
        **_: Any,
    ) -> None:
        """Ask for a checkpoint when one is due, and a last one where there is one already."""
        every = self._settings.save_steps
        due = every is not None and state.global_step % every == 0
        if state.global_step >= state.max_steps:
            due = due or any(self.folder.glob("checkpoint-*"))
        elif self._settings.save_seconds is not None and not due:
            due = self._is_late(state.global_step)
        if due:
            control.should_save = True
            self._began = time.monotonic()

    def on_save(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        **_: Any,
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

    def _is_late(self, step: int) -> bool:
        since = time.monotonic() - self._saved_at
        late = since >= max(self._settings.save_seconds or 0.0, _SPARING * self._cost)
        if not distributed.is_initialized():
            return late
        if step % 10:  # clocks differ and all must save together, but asking takes time
            return False
        answer = [late]
        distributed.broadcast_object_list(answer, src=0)
        return answer[0]


def seal(folder: Path, step: int) -> None:
    """Mark a checkpoint as complete: first every byte on disk, then the list of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in [*files, folder, folder.parent]:
        _sync(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_atomically(folder / SEAL, json.dumps({"step": step, "files": sizes}, indent=2) + "\n")
    _sync(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the list exists, and every file on it with the recorded length."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files: dict[str, int] = content["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _common(steps: set[int]) -> set[int]:
    """The steps of which all processes have a checkpoint; all of them where there is one."""
    if not distributed.is_initialized():
        return steps
    gathered: list[set[int]] = [set() for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, steps)
    return set.intersection(*gathered)


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
