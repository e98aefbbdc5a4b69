"""Sends the figures of a training to TensorBoard or MLflow while it runs.

Writes run/tensorboard/ and run/mlflow.db, as `finetune.report_to` says, and next to the checkpoints
the id of the MLflow run: an interrupted training resumes in it.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import MissingExtraError
from ..mlflow_store import experiment_of, quiet_mlflow
from ..recipe import Recipe
from ..run import Run, write_atomically

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
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """Open the store."""
        if state.is_world_process_zero:
            self.begin(state.global_step)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Called by the trainer with each step's figures."""
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if state.is_world_process_zero and numbers:
            self.figures(state.global_step, numbers)

    def on_save(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """A training resumed from this checkpoint does not log the earlier steps again."""
        if state.is_world_process_zero:
            self.flush()

    def on_train_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
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
        with quiet_mlflow():
            self._client, experiment = experiment_of(self._recipe.name, self._run)
            if not self._go_on():
                from mlflow.entities import Param

                name = f"{self._run.name} finetune"
                self._id = self._client.create_run(experiment, run_name=name).info.run_id
                write_atomically(self._kept, self._id)
                # Every MLflow store takes 500 characters; Azure ML's refuses longer ones.
                settings = self._recipe.finetune.model_dump(mode="json").items()
                params = [Param(key, str(value)[:500]) for key, value in settings]
                self._client.log_batch(self._id, params=params)

    def _go_on(self) -> bool:
        """Resume the MLflow run of an interrupted training; False if there is none."""
        from mlflow.exceptions import MlflowException

        if not self._kept.is_file():
            return False
        self._id = self._kept.read_text(encoding="utf-8")
        try:
            known = self._client.get_run(self._id)
        except MlflowException:  # somebody removed the store
            return False
        for name in known.data.metrics:
            history = self._client.get_metric_history(self._id, name)
            self._logged[name] = max(entry.step for entry in history)
        self._client.update_run(self._id, status="RUNNING")
        return True

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
