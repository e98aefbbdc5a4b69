"""Registers the tuned model with MLflow: a sqlite store in the run folder.

Reads `model.json`, `dataset.json`, `metrics.json` and run/model; writes run/mlflow.db and
run/mlflow/ (the model as an MLflow pyfunc that answers chats).
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .quiet import captured_output
from .run import Run

# Read at import time by MLflow.
QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
}
# What the registered model needs to load; named here because MLflow's own guess imports the model.
REQUIREMENTS = ["torch==2.13.0", "transformers>=5.20,<6", "tokenizers>=0.22", "jinja2>=3.1"]


def register(name: str, run: Run) -> dict[str, Any]:
    """Log run/model as a new version of the registered model `name`; the manifest.

    Raises StageError when an earlier stage has not been done.
    """
    model = run.require("model", "phi3 train")
    metrics = run.require("metrics", "phi3 evaluate")
    store = run.path / "mlflow.db"
    with _quiet():
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{store}")
        experiment = mlflow.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else mlflow.create_experiment(name, artifact_location=run.file("mlflow").as_uri())
        )
        with mlflow.start_run(experiment_id=experiment_id, run_name=run.name) as active:
            mlflow.log_params(_params(run))
            mlflow.log_metrics(_flat_metrics(metrics))
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("mlflow_model.py")),
                artifacts={"model": str(run.path / model["path"])},
                code_paths=[str(Path(__file__).parent)],
                pip_requirements=REQUIREMENTS,
                registered_model_name=name,
            )
    return {
        "model": name,
        "model_version": str(logged.registered_model_version),
        "store": store.name,
        "tracking_uri": f"sqlite:///{store}",
        "mlflow_run_id": active.info.run_id,
    }


def _params(run: Run) -> dict[str, Any]:
    """Data and fine-tuning settings, cut to the 500 characters that every MLflow store takes."""
    found = {}
    for stage in ("dataset", "base", "model"):
        settings = (run.manifest(stage) or {}).get("settings", {})
        found.update({f"{stage}.{key}": str(value)[:500] for key, value in settings.items()})
    return found


def _flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{when}.{part}.{key}": float(value)
        for when in ("before", "after")
        for part, values in metrics[when].items()
        for key, value in values.items()
        if isinstance(value, (int, float))
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow reports migrations, sizes and "Successfully registered": nothing to act on."""
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with captured_output(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
