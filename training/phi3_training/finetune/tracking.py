"""Sends the figures of a training to TensorBoard or MLflow while it runs.

Writes run/tensorboard/ and run/mlflow.db, as `finetune.report_to` says.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import MissingExtraError
from ..mlflow_store import experiment_of, quiet_mlflow
from ..recipe import Recipe
from ..run import Run

_BATCH = 100  # figures per write: sqlite takes as long for one as for a hundred


def trackers(recipe: Recipe, run: Run) -> list[TrainerCallback]:
    """A callback for each name in `finetune.report_to`; MissingExtraError without its package."""
    made: list[TrainerCallback] = []
    if "tensorboard" in recipe.finetune.report_to:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtraError("tensorboard", "tensorboard")
        made.append(_TensorBoard(run))
    if "mlflow" in recipe.finetune.report_to:
        if importlib.util.find_spec("mlflow") is None:
            raise MissingExtraError("mlflow", "local")
        made.append(_MLflow(recipe, run))
    return made


class _Tracker(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Hands over what the main process logs."""

    def begin(self) -> None: ...
    def figures(self, step: int, figures: dict[str, float]) -> None: ...
    def end(self) -> None: ...

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """Open the store."""
        if state.is_world_process_zero:
            self.begin()

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

    def on_train_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """Write what is left and close."""
        if state.is_world_process_zero:
            self.end()


class _TensorBoard(_Tracker):
    def __init__(self, run: Run) -> None:
        self._folder = run.path / "tensorboard"

    def begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder))

    def figures(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


class _MLflow(_Tracker):
    """A run `NAME finetune` in the store that the register stage uses as well."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self._recipe, self._run = recipe, run
        self._waiting: list[Any] = []

    def begin(self) -> None:
        with quiet_mlflow():
            from mlflow.entities import Param

            self._client, experiment = experiment_of(self._recipe.name, self._run)
            name = f"{self._run.name} finetune"
            self._id = self._client.create_run(experiment, run_name=name).info.run_id
            # Every MLflow store takes 500 characters; Azure ML's refuses longer ones.
            settings = self._recipe.finetune.model_dump(mode="json").items()
            params = [Param(key, str(value)[:500]) for key, value in settings]
            self._client.log_batch(self._id, params=params)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in figures.items()]
        if len(self._waiting) >= _BATCH:
            self._flush()

    def end(self) -> None:
        self._flush()
        with quiet_mlflow():
            self._client.set_terminated(self._id)

    def _flush(self) -> None:
        with quiet_mlflow():
            self._client.log_batch(self._id, metrics=self._waiting)
        self._waiting = []
