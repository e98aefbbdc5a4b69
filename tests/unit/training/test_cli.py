"""`phi3` without any stage: help, usage errors, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training.cli import main


def test_no_command_shows_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "phi3 up" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["up", "plan", "status", "down", "train", "evaluate", "register", "deploy", "connect",
     "adapters", "chat", "env", "serve", "recipes", "data check", "data prepare", "data show"],
)  # fmt: skip
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])

    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "example:" in shown
    assert "phi3" in shown.split("example:")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["up", "none.yaml"], "no such file"),
        (["up", "a.yaml", "b.yaml"], "One recipe at a time"),
        (["up", "finetune.lora_r=0"], "finetune.lora_r"),
        (["train", "--adapter", "a", "finetune.lora_r=0"], "finetune.lora_r"),
        (["train", "--adapter", "no/name"], "finetune.adapter"),
        (["train", "finetune.method=adapter"], "peft has no bottleneck adapters"),
        (["train", "finetune.early_stopping_patience=2"], "give eval_steps as well"),
        (["adapters"], "make one with: phi3 up"),
        (["up", "--again", "sing"], "No stage sing"),
        (["up", "--on", "azure"], "Azure half"),
        (["up", "--run", "a b"], "not a run name"),
        (["down", "none"], "There is no run"),
        (["chat", "hello"], "phi3 up"),
        (["chat", "hello", "--run", "none"], "There is no run"),
        (["serve"], "phi3 train"),
    ],
)
def test_usage_errors_exit_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--runs", str(tmp_path / "runs")]) == 2
    assert told in capsys.readouterr().err


def test_status_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--runs", str(tmp_path)]) == 0
    assert "make one with: phi3 up" in capsys.readouterr().out

    assert main(["status", "--runs", str(tmp_path), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_down_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down", "--runs", str(tmp_path)]) == 0
    assert "Nothing of ours is running" in capsys.readouterr().out


def test_plan_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--runs", str(tmp_path / "runs"), "-o", "json"]) == 0

    plan = json.loads(capsys.readouterr().out)
    assert plan["to_do"][0] == "prepare"
    assert len(plan["to_do"]) == 9
    assert not (tmp_path / "runs").exists()


def test_recipes_and_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "phi3-tiny.yaml" in capsys.readouterr().out

    assert main(["recipes", "--keys"]) == 0
    assert "finetune.learning_rate" in capsys.readouterr().out
