"""The MLflow store of a run: sqlite in the run folder, without MLflow's messages.

Reads and writes run/mlflow.db; artifacts go to run/mlflow/.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .progress import captured_output
from .run import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Read at import time by MLflow: no usage reports, no progress bars, from a user's laptop.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",  # GitPython warns where there is no git
}


def tracking_uri(run: Run) -> str:
    """The address of the run's store."""
    return f"sqlite:///{run.path / 'mlflow.db'}"


def experiment_of(name: str, run: Run) -> tuple[MlflowClient, str]:
    """A client of the run's store and the id of the experiment `name`, made if need be."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(run))
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return client, str(experiment.experiment_id)
    artifacts = run.file("mlflow").as_uri()
    return client, str(client.create_experiment(name, artifact_location=artifacts))


@contextmanager
def quiet_mlflow() -> Iterator[None]:
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
