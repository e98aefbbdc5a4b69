"""A fine-tuning that is killed goes on as if nothing had happened: same rows, same losses."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.small_run import (
    copy_of,
    kill_before_opening,
    kill_when,
    losses,
    make_small_run,
    steps,
    train_apart,
)

from phi3_training.finetune.callbacks import SEAL
from phi3_training.manifests import ModelManifest
from phi3_training.run import Run

# What the kills are spread over; each draws on other states that have to be restored.
WAYS = {
    "dropout": [],
    "full": ["finetune.method=full", "finetune.learning_rate=1e-3"],
    "accumulation": [
        "finetune.gradient_accumulation_steps=2",
        "finetune.per_device_train_batch_size=5",
    ],
    "packing": [
        "finetune.packing=true",
        "finetune.per_device_train_batch_size=1",
        "data.max_length=128",
    ],
    "evaluations": ["finetune.eval_steps=4", "finetune.lr_scheduler_type=linear"],
}
DRAW = random.Random(20)  # noqa: S311 - picks steps, guards nothing
# One kill for each way but the first, which other tests kill, at every run of the tests; all of
# them and a second one with `make test-all`.
SLOW = pytest.mark.slow
KILLS = [
    pytest.param(way, DRAW.random(), marks=[SLOW] if second or way == "dropout" else [])
    for second in (False, True)
    for way in WAYS
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_run(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path) -> Callable[[str], list[tuple[int, float]]]:
    """The losses of each way, trained without a kill and without checkpoints."""
    known: dict[str, list[tuple[int, float]]] = {}

    def of(way: str) -> list[tuple[int, float]]:
        if way not in known:
            run = copy_of(prepared, f"whole-{way}")
            train_apart(run, [*WAYS[way], "finetune.save_steps=null"])
            known[way] = losses(run)
        return known[way]

    return of


def checkpoints(run: Path) -> list[Path]:
    found = run.glob("finetune/checkpoints/*/checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def assert_same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    """Every step once, in order, with the loss of the training that was never killed."""
    assert [step for step, _ in found] == list(range(1, len(expected) + 1))
    assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize(("way", "share"), KILLS)
def test_a_kill_at_a_random_step_changes_nothing(
    way: str, share: float, prepared: Path, uninterrupted: Callable[[str], list[tuple[int, float]]]
) -> None:
    expected = uninterrupted(way)
    step = 6 + int(share * (len(expected) - 8))
    run = copy_of(prepared, f"killed-{way}-{step}")
    kill_when(run, WAYS[way], lambda: steps(run) >= step)
    assert len(losses(run)) < len(expected)
    train_apart(run, WAYS[way])
    assert_same(losses(run), expected)
    resumed = [
        text
        for text in Run(run).require(ModelManifest).choices
        if "Resumed from checkpoint" in text
    ]
    assert len(resumed) == 1
    assert not (run / "finetune" / "checkpoints").exists()


def test_a_run_killed_again_and_again_comes_to_the_same_end(
    prepared: Path, uninterrupted: Callable[[str], list[tuple[int, float]]]
) -> None:
    run = copy_of(prepared, "killed-often")
    for step in (7, 23, 41):
        kill_when(run, [], lambda step=step: steps(run) >= step)
    train_apart(run)
    assert_same(losses(run), uninterrupted("dropout"))
    assert model_bytes(run) == model_bytes(prepared.with_name("whole-dropout"))


def model_bytes(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_kill_while_a_checkpoint_is_written(
    prepared: Path, uninterrupted: Callable[[str], list[tuple[int, float]]]
) -> None:
    """What was half written is not used; training goes on from the one before."""
    run = copy_of(prepared, "half")
    kill_before_opening(run, "checkpoint-20/trainer_state.json")
    last = checkpoints(run)[-1]
    assert not (last / SEAL).exists()
    assert last.name == "checkpoint-20"
    train_apart(run)
    assert "checkpoint at step 15" in str(Run(run).require(ModelManifest).choices)
    assert_same(losses(run), uninterrupted("dropout"))


@pytest.fixture(scope="module")
def killed(prepared: Path) -> Path:
    """A run that was killed after step 22: checkpoints 15 and 20 are there."""
    run = copy_of(prepared, "killed")
    # Written anew when training begins, opened once for each step.
    kill_before_opening(run, "finetune/loss.jsonl", 23)
    assert steps(run) == 22
    assert [path.name for path in checkpoints(run)] == ["checkpoint-15", "checkpoint-20"]
    return run


def test_no_model_card_is_written_beside_a_checkpoint(killed: Path) -> None:
    """Rendering it took as long as a step of training; nobody reads it."""
    assert checkpoints(killed)
    assert not list((killed / "finetune").rglob("README.md"))


def without_seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).unlink()


def cut_optimizer(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-100])


def lost_random_state(checkpoint: Path) -> None:
    (checkpoint / "rng_state.pth").unlink()


def half_a_seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).write_text((checkpoint / SEAL).read_text()[:30])


@pytest.mark.parametrize(
    "damage",
    [
        without_seal,
        cut_optimizer,
        pytest.param(lost_random_state, marks=SLOW),
        pytest.param(half_a_seal, marks=SLOW),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None],
    killed: Path,
    uninterrupted: Callable[[str], list[tuple[int, float]]],
) -> None:
    run = copy_of(killed, f"damaged-{damage.__name__}")
    damage(checkpoints(run)[-1])
    train_apart(run)
    assert "checkpoint at step 15" in str(Run(run).require(ModelManifest).choices)
    assert_same(losses(run), uninterrupted("dropout"))


@pytest.mark.parametrize(
    "other",
    [
        ["finetune.learning_rate=4e-3"],
        pytest.param(["finetune.seed=7"], marks=SLOW),
        pytest.param(["data.max_length=300"], marks=SLOW),
    ],
)
def test_other_settings_do_not_take_the_checkpoint(other: list[str], killed: Path) -> None:
    run = copy_of(killed, f"other-{other[0]}".replace("=", "-"))
    train_apart(run, other)
    assert "Resumed from checkpoint" not in str(Run(run).require(ModelManifest).choices)
    assert [step for step, _ in losses(run)] == list(range(1, 57))


def test_other_chats_do_not_take_the_checkpoint(killed: Path) -> None:
    run = copy_of(killed, "other-chats")
    path = run / "data" / "train.jsonl"
    path.write_text(path.read_text().replace("euros", "crowns"))
    train_apart(run)
    assert "Resumed from checkpoint" not in str(Run(run).require(ModelManifest).choices)


@SLOW
def test_another_base_does_not_take_the_checkpoint(killed: Path) -> None:
    run = copy_of(killed, "other-base")
    weights = run / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(bytes(content))
    train_apart(run)
    assert "Resumed from checkpoint" not in str(Run(run).require(ModelManifest).choices)


def test_how_often_is_saved_may_change_in_between(
    killed: Path, uninterrupted: Callable[[str], list[tuple[int, float]]]
) -> None:
    run = copy_of(killed, "other-saving")
    train_apart(run, ["finetune.save_steps=9", "finetune.save_total_limit=1"])
    assert "checkpoint at step 20" in str(Run(run).require(ModelManifest).choices)
    assert_same(losses(run), uninterrupted("dropout"))


def test_saving_by_seconds_keeps_to_the_limit(prepared: Path) -> None:
    run = copy_of(prepared, "seconds")
    settings = ["finetune.save_steps=null", "finetune.save_seconds=0.01"]
    settings += ["finetune.num_train_epochs=16", "finetune.save_total_limit=1"]
    kill_when(run, settings, lambda: steps(run) >= 60)
    kept = [path for path in checkpoints(run) if (path / SEAL).exists()]
    assert kept
    # One part in twenty of the time: far fewer than one for each of the 60 steps.
    assert len(checkpoints(run)) <= 2
    train_apart(run, settings)
    assert len(losses(run)) == 112


def test_a_short_training_writes_no_checkpoint(prepared: Path) -> None:
    """With the default of one in 60 seconds, what takes less of them saves nothing."""
    run = copy_of(prepared, "short")
    kill_when(run, ["finetune.save_steps=null"], (run / "adapter").exists)
    assert len(losses(run)) == 56
    assert checkpoints(run) == []


def test_killed_after_the_last_step_trains_no_step_twice(
    prepared: Path, uninterrupted: Callable[[str], list[tuple[int, float]]]
) -> None:
    """The last checkpoint holds the finished training: only merging is left to be done."""
    run = copy_of(prepared, "at-the-end")
    kill_when(run, [], lambda: bool(list(run.glob("finetune/checkpoints/*/checkpoint-56/" + SEAL))))
    shutil.rmtree(run / "model", ignore_errors=True)
    train_apart(run)
    assert "checkpoint at step 56" in str(Run(run).require(ModelManifest).choices)
    assert_same(losses(run), uninterrupted("dropout"))
    assert model_bytes(run) == model_bytes(prepared.with_name("whole-dropout"))


@SLOW
def test_the_command_resumes_after_a_kill(prepared: Path, tmp_path: Path) -> None:
    """`phi3 train`, `kill -9`, `phi3 train`: stages that were done stay done, no lock is left."""
    command = [sys.executable, "-m", "phi3_training.cli", "train"]
    command += [str(prepared.parent / "recipe.yaml"), "--runs", str(tmp_path), "--run", "shot"]
    command += ["finetune.num_train_epochs=40"]
    run = tmp_path / "shot"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while len(losses(run)) < 33:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=30)
    base = (run / "base.json").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    went_on = re.search(r"Resumed from checkpoint at step (\d+)", again.stderr)
    assert went_on is not None
    assert int(went_on.group(1)) >= 30
    assert [step for step, _ in losses(run)] == list(range(1, 281))
    assert (run / "base.json").read_bytes() == base
