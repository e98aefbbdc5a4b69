"""A training that was killed goes on in the same MLflow run and the same TensorBoard series."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.small_run import kill_when, losses, make_small_run, steps, train, train_apart

TRACKED = ["finetune.report_to=[mlflow,tensorboard]", "finetune.save_steps=5"]


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed behind the second checkpoint, then trained to the end."""
    pytest.importorskip("tensorboard")
    run = make_small_run(tmp_path_factory.mktemp("tracked"))
    kill_when(run, TRACKED, lambda: steps(run) >= 13)
    train_apart(run, TRACKED)
    return run


def test_mlflow_has_one_run_with_each_step_once(killed_and_resumed: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{killed_and_resumed / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    logged = losses(killed_and_resumed)
    assert [entry.step for entry in history] == [step for step, _ in logged]
    for entry, (_, loss) in zip(history, logged, strict=True):
        assert entry.value == pytest.approx(loss, abs=1e-5)


def test_tensorboard_shows_one_series(killed_and_resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed_and_resumed / "tensorboard"))
    events.Reload()
    assert [entry.step for entry in events.Scalars("loss")] == [
        step for step, _ in losses(killed_and_resumed)
    ]


def test_the_next_training_is_a_run_of_its_own(killed_and_resumed: Path) -> None:
    from mlflow import MlflowClient

    train(killed_and_resumed, [*TRACKED, "finetune.num_train_epochs=1"])
    client = MlflowClient(f"sqlite:///{killed_and_resumed / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert len(client.search_runs([experiment.experiment_id])) == 2
    test_tensorboard_shows_one_series(killed_and_resumed)
