"""`pip install "phi3-promptflow[local]"` alone: every process of it finds no Prompt flow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.integration.no_promptflow import block_promptflow

from phi3_training.stages import stages_of

from .conftest import PROJECT, Laptop

ADDED_BY = 'pip install "phi3-promptflow[flow]"'
# So little training does not pass the gate; what is tested is the way there.
QUICK = ("base.num_train_epochs=2", "finetune.num_train_epochs=1", "evaluate.max_rows=5", "--force")
pytestmark = pytest.mark.slow  # `test_without_store` tries the pieces in seconds
RECIPE = str(PROJECT / "training/recipes/phi3-tiny.yaml")


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """A machine without Prompt flow on which `phi3 up` was typed once."""
    first = block_promptflow(tmp_path_factory.mktemp("blocked"))

    class WithoutPromptFlow(Laptop):
        def environment(self, **extra: str) -> dict[str, str]:
            found = super().environment(**extra)
            return {**found, "PYTHONPATH": os.pathsep.join([first, found["PYTHONPATH"]])}

    machine = WithoutPromptFlow(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("work"))
    try:
        done = machine.run("phi3", "up", RECIPE, *QUICK)
        assert done.returncode == 0, done.stderr
        yield machine
    finally:
        machine.run("phi3", "down")
        left = machine.processes()
        for process in left:
            process.terminate()
        psutil.wait_procs(left, timeout=10)


def test_up_says_in_a_line_each_what_it_leaves_out(laptop: Laptop) -> None:
    printed = laptop.printed[0]
    for stage in ("connect", "ask"):
        (line,) = re.findall(rf"^\S {stage} .*", printed, re.MULTILINE)
        assert "left out" in line
        assert ADDED_BY in line
    assert "After:" in printed
    assert "pf flow test" not in printed
    assert "chat --web" not in printed


def test_the_same_endpoint_answers_everywhere(laptop: Laptop, tmp_path: Path) -> None:
    """The key is the running server's: nothing wrote it down."""
    manifest = json.loads((laptop.work / "runs/phi3-tiny/answer.json").read_text("utf-8"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": manifest["question"]}) + "\n", "utf-8")

    chat = laptop.run("phi3", "chat", manifest["question"])
    batch = laptop.run("phi3", "batch", str(questions), "--out", str(tmp_path / "answers.jsonl"))

    assert chat.stdout.strip() == manifest["answer"], chat.stderr
    assert batch.returncode == 0, batch.stderr
    answers = (tmp_path / "answers.jsonl").read_text("utf-8")
    assert json.loads(answers.splitlines()[0])["answer"] == manifest["answer"]


def test_up_again_does_nothing_and_restarts_nothing(laptop: Laptop) -> None:
    again = laptop.run("phi3", "up", RECIPE, *QUICK)

    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already done") == len(stages_of(in_cloud=False)) - 1
    assert again.stderr.count("left out") == 2


def test_doctor_finds_no_fault(laptop: Laptop) -> None:
    done = laptop.run("phi3", "doctor", "-o", "json")

    report = json.loads(done.stdout)
    assert [each for each in report["findings"] if each["state"] == "fault"] == []
    checks = {each["check"]: each for each in report["findings"]}
    assert checks["promptflow"]["fix"] == ADDED_BY
    assert checks["one token"]["state"] == "ok"
    assert done.returncode == 0


def test_what_needs_prompt_flow_says_how_to_add_it(laptop: Laptop) -> None:
    for command in (("connect", RECIPE, *QUICK[:-1]), ("chat", "--web")):
        done = laptop.run("phi3", *command)
        assert done.returncode == 1, command
        assert ADDED_BY in done.stderr
        assert "Traceback" not in done.stderr


def test_status_and_down(laptop: Laptop) -> None:
    (state,) = json.loads(laptop.run("phi3", "status", "-o", "json").stdout)
    assert state["endpoint"]["state"] == "up"

    assert "Stopped the endpoint of phi3-tiny" in laptop.run("phi3", "down").stdout
