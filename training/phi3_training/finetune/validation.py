"""Watches the loss on held-out chats while training: stops when it no longer falls, keeps the best.

Writes run/finetune/eval.jsonl and run/finetune/best.safetensors (the learning weights only).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Validation(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Logs each evaluation; with `patience`, ends after so many without a better one.

    A training that goes on from a checkpoint goes on with what the files say.
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
        **_kwargs: Any,
    ) -> None:
        """Begin anew, or with the evaluations before the checkpoint."""
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
        model: Any = None,
        **_kwargs: Any,
    ) -> None:
        """Called by the trainer after each evaluation."""
        self.losses.append((state.global_step, float(metrics["eval_loss"])))
        best = self.best
        better = best == self.losses[-1]
        if state.is_world_process_zero:
            self._write()
            if better and self._patience:
                _save(model, self._weights)
        steps = [step for step, _ in self.losses]
        since = len(steps) - 1 - steps.index(best[0]) if best else 0
        if self._patience and since >= self._patience:
            self.stopped = control.should_training_stop = True

    def restore(self, model: Any) -> str | None:
        """Give `model` the best weights back; says so, or None when nothing is to be done."""
        best = self.best
        if not self._patience or best is None or not self._weights.is_file():
            return None
        model.load_state_dict(load_file(self._weights), strict=False)
        why = f"no better in {self._patience} evaluations" if self.stopped else "the best of all"
        return f"kept the weights of step {best[0]}: held-out loss {best[1]:.3f}, {why}"

    def clear(self) -> None:
        """Remove the kept weights, once the model is written."""
        self._weights.unlink(missing_ok=True)

    def _write(self) -> None:
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in self.losses]
        self._log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _save(model: Any, path: Path) -> None:
    """Write what learns, in one step."""
    learning = {
        name: weight.detach().to("cpu", copy=True).contiguous()
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dtype != torch.uint8
    }
    made = path.with_name(f".{path.name}")
    save_file(learning, made)
    made.replace(path)
