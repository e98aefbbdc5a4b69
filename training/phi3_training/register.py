"""Registers the tuned model with MLflow: a sqlite store in the run folder.

Reads `model.json`, `dataset.json`, `metrics.json` and run/model; writes run/mlflow.db and
run/mlflow/ (the model as an MLflow pyfunc that answers chats).
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from .carried import copy_carried
from .manifests import (
    BaseManifest,
    DatasetManifest,
    GateManifest,
    MetricsManifest,
    ModelManifest,
    RegistrationManifest,
)
from .mlflow_store import experiment_of, quiet_mlflow, tracking_uri
from .packages import MODEL_PACKAGES
from .run import Run

# The module that answers for a registered model; with what it imports, all of our code in there.
MLFLOW_MODEL = "phi3_training.mlflow_model"


def register(run: Run) -> RegistrationManifest:
    """Log run/model as a new version of the registered model of the run's name; the manifest.

    The version's tag `gate_passed` says whether the gate let it pass. Raises StageError when an
    earlier stage has not been done.
    """
    name = run.name
    model = run.require(ModelManifest)
    gate = run.read(GateManifest)
    tags = {} if gate is None else {"gate_passed": str(gate.passed)}
    metrics = run.require(MetricsManifest)
    with quiet_mlflow(), tempfile.TemporaryDirectory(prefix="phi3-model-") as code:
        import mlflow

        # The model answers where phi3 is not installed: it brings the files that it runs.
        copy_carried(Path(code), MLFLOW_MODEL)

        mlflow.set_tracking_uri(tracking_uri(run))
        client, experiment_id = experiment_of(name, run)
        with mlflow.start_run(experiment_id=experiment_id, run_name=run.name) as active:
            # 500 characters: the shortest limit of an MLflow store; longer ones fail the call.
            manifests = (run.read(DatasetManifest), run.read(BaseManifest), run.read(ModelManifest))
            mlflow.log_params(
                {
                    f"{manifest.STAGE}.{key}": str(value)[:500]
                    for manifest in manifests
                    if manifest is not None
                    for key, value in manifest.settings.items()
                }
            )
            mlflow.log_metrics(
                {
                    f"{when}.{part}.{key}": float(value)
                    for when, side in (("before", metrics.before), ("after", metrics.after))
                    for part, values in side.items()
                    for key, value in values.items()
                }
            )
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("mlflow_model.py")),
                artifacts={"model": str(run.path / model.path)},
                code_paths=[str(Path(code, "phi3_training"))],
                # Named because MLflow's own guess imports the model; without torch's `+cpu`.
                pip_requirements=[
                    f"{name}=={version(name).partition('+')[0]}" for name in MODEL_PACKAGES
                ],
                registered_model_name=name,
            )
        number = str(logged.registered_model_version)
        for tag, value in tags.items():
            client.set_model_version_tag(name, number, tag, value)
    return RegistrationManifest(
        model=name,
        model_version=number,
        tags=tags,
        store="mlflow.db",
        tracking_uri=tracking_uri(run),
        mlflow_run_id=active.info.run_id,
    )
