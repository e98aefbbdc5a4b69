"""`phi3` without any stage: help, usage errors, exit codes."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_training.cli import main
from phi3_training.commands import GROUPS, Group
from phi3_training.commands.chat import converse
from phi3_training.commands.common import recipe_of
from phi3_training.journey import Journey
from phi3_training.manifests import DatasetManifest
from phi3_training.run import Run
from phi3_training.stages import STAGES, stages_of
from phi3_training.targets import get_target


def test_no_command_shows_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "phi3 up" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["up", "plan", "status", "down", "train", "evaluate", "register", "deploy", "connect",
     "adapters", "rag make-chats", "rag compare", "chat", "env", "serve", "recipes", "data check",
     "data fix", "data convert", "data prepare", "data show", "agent chat", "agent serve",
     "agent ui", "agent pack", "flow to-agent"],
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
        (["up", "a.yaml", "b.yaml"], "Expected one recipe"),
        (["up", "finetune.lora_r=0"], "finetune.lora_r"),
        (["train", "--adapter", "a", "finetune.lora_r=0"], "finetune.lora_r"),
        (["train", "--adapter", "no/name"], "finetune.adapter"),
        (["train", "finetune.method=adapter"], "peft has no bottleneck adapters"),
        (["train", "finetune.early_stopping_patience=2"], "set eval_steps as well"),
        (["adapters"], "create one with: phi3 up"),
        (["up", "--again", "sing"], "No stage sing"),
        (["up", "--run", "a b"], "not a run name"),
        (["down", "none"], "There is no run"),
        (["chat", "hello"], "phi3 up"),
        (["chat", "hello", "--run", "none"], "There is no run"),
        (["chat", "hello", "--run", "../../etc"], "not a run name"),
        (["chat", "-o", "json"], "answers one question"),
        (["chat", "hello", "--compare", "base,best"], "unknown: best"),
        (["chat", "hello", "--compare", "base", "--web"], "without --web"),
        (["plan", "--run", "../other"], "not a run name"),
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
    assert "create one with: phi3 up" in capsys.readouterr().out

    assert main(["status", "--runs", str(tmp_path), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_down_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down", "--runs", str(tmp_path)]) == 0
    assert "Nothing of ours is running" in capsys.readouterr().out

    assert main(["down", "--on", "azure", "--all", "--yes", "--runs", str(tmp_path)]) == 0
    assert "phi3 down --on azure --workspace NAME" in capsys.readouterr().out


@pytest.fixture
def half_broken(tmp_path: Path) -> Path:
    """Two runs; in one of them two manifests are no JSON any more."""
    runs = tmp_path / "runs"
    for name in ("whole", "hurt"):
        Run.open(runs / name).write(DatasetManifest(outputs={}, done_id="1"))
    (runs / "hurt" / "base.json").write_text("{")
    (runs / "hurt" / "endpoint.json").write_text("[]")
    return runs


def test_status_names_broken_manifests_and_lists_the_rest(
    half_broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--runs", str(half_broken)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("delete the file to run the stage again") == 2
    assert "whole prepare" in shown

    assert main(["status", "--runs", str(half_broken), "-o", "json"]) == 0
    states = {state["run"]: state for state in json.loads(capsys.readouterr().out)}
    assert states["whole"]["broken"] == []
    assert states["hurt"]["done"] == ["prepare"]
    assert [fault.split(" ")[0].rpartition("/")[2] for fault in states["hurt"]["broken"]] == [
        "base.json",
        "endpoint.json",
    ]
    assert states["hurt"]["endpoint"]["state"] == "unknown"


def test_down_continues_past_a_broken_manifest_and_fails(
    half_broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["down", "--runs", str(half_broken), "-o", "json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["stopped"] == []
    assert "endpoint.json" in " ".join(shown.err.split())


def test_another_question_does_nothing_again_but_asking() -> None:
    """Above all not the evaluation, and with it registering and deploying."""
    first, second = (
        Journey(recipe_of([f"ask={question}"]), Run(Path("none")), get_target("local"), Path())
        for question in ("Who are you?", "When do you open?")
    )
    changed = [stage.title for stage in STAGES if stage.inputs(first) != stage.inputs(second)]
    assert changed == ["ask"]


def test_plan_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--runs", str(tmp_path / "runs"), "-o", "json"]) == 0

    plan = json.loads(capsys.readouterr().out)
    assert plan["to_do"][0] == "prepare"
    assert plan["to_do"] == [stage.title for stage in stages_of(in_cloud=False)]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "outdoor_chats_heldout.jsonl"),
        (("data.train=FILE",), "a share of 20% of them is held out"),
        (("data.train=FILE",), "asks the first held-out question"),
        (("data.train=FILE", "data.validation=FILE"), "held out: FILE"),
        (("data.train=FILE", "ask=How much #3?"), "asks 'How much #3?'"),
    ],
)
def test_plan_says_which_chats_are_learnt_and_which_are_held_out(
    words: tuple[str, ...], said: str, chats: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = tuple(word.replace("FILE", str(chats)) for word in words)
    assert main(["plan", *words, "--runs", str(tmp_path / "runs"), "-o", "json"]) == 0
    first = json.loads(capsys.readouterr().out)["plan"][0]
    assert first["stage"] == "prepare"
    assert said.replace("FILE", str(chats)) in first["text"]


def test_recipes_and_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "phi3-tiny.yaml" in capsys.readouterr().out

    assert main(["recipes", "--keys"]) == 0
    assert "finetune.learning_rate" in capsys.readouterr().out


CHATS = [
    {"messages": [{"role": "user", "content": f"Do you repair {item}?"},
                  {"role": "assistant", "content": "We do, within a week."}]}
    for item in ("tents", "boots", "stoves", "ropes", "packs", "maps")
]  # fmt: skip


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "my chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
    return path


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["plan", *arguments, "-o", "json"]) == 0
    to_do: list[str] = json.loads(capsys.readouterr().out)["to_do"]
    return to_do


@pytest.mark.patient
def test_named_run_continues_with_its_own_recipe(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else `phi3 up --run mine` would train the shipped chats over the user's own model."""
    runs = ["--runs", str(tmp_path / "runs"), "--run", "mine"]
    # One key stands behind an option, as the documentation has it.
    mine = ["data.validation=[]", *runs, f"data.train={chats}"]

    assert main(["data", "prepare", *mine]) == 0
    said = " ".join(" ".join(capsys.readouterr()).split())
    assert "one of their questions is asked at the end" in said
    assert "the held-out chats are taken from them" not in said, "data.validation was named"

    assert "prepare" not in plan_of(capsys, *runs)
    assert "prepare" not in plan_of(capsys, *runs, "ask=Hello?")
    assert "prepare" in plan_of(capsys, *runs, "training/recipes/phi3-tiny.yaml")


@pytest.mark.parametrize("count", ["-1", "x", "1.5"])
def test_data_show_of_a_wrong_count(count: str, chats: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "show", str(chats), "-n", count])

    assert ended.value.code == 2


def test_option_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["up", "--fast"])

    assert ended.value.code == 2
    assert "--fast" in capsys.readouterr().err


def test_what_the_system_refuses_is_no_traceback(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "mine" / "recipe.yaml").mkdir(parents=True)

    status = main(["data", "prepare", "--runs", str(tmp_path / "runs"), "--run", "mine"])

    assert status == 1
    assert "recipe.yaml" in capsys.readouterr().err


class Talker:
    """A client that notes what it is asked and always says the same."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []

    def stream(self, messages: list[dict[str, str]], **_: object) -> list[str]:
        self.asked.append(messages)
        return ["All ", "right."]


def test_long_conversation_drops_its_oldest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Talker()
    questions = [f"Question number {number}, and some words more?" for number in range(12)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions) + "\n"))
    args = argparse.Namespace(
        rag=False, system="Be kind.", temperature=0.0, top_p=1.0, max_new_tokens=256
    )

    assert converse(client, args, 120) == 0  # type: ignore[arg-type]

    assert len(client.asked) == len(questions)
    first, last = client.asked[1], client.asked[-1]
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert last[0]["content"] == "Be kind."
    assert last[-1]["content"] == questions[-1]
    assert questions[-2] in [message["content"] for message in last]
    assert questions[0] not in [message["content"] for message in last]


@pytest.mark.patient
@pytest.mark.parametrize("command", ["up", "train"])
def test_bad_chats_are_refused_and_nothing_is_trained(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\nnot json\n')
    runs = tmp_path / "runs"

    assert main([command, f"data.train={bad}", "--run", "bad", "--runs", str(runs)]) == 1

    said = capsys.readouterr().err
    assert "bad.jsonl:1" in said
    assert "bad.jsonl:2" in said
    assert {path.name for path in (runs / "bad").iterdir()} <= {
        ".lock",
        "recipe.yaml",
        "data-faults.txt",
    }


def test_help_loads_no_command() -> None:
    code = (
        "import sys\nfrom phi3_training.cli import main\ntry: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(str({'pydantic', 'requests', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: str(group.register))
def test_a_group_registers_the_commands_that_help_lists(group: Group) -> None:
    subparsers = argparse.ArgumentParser().add_subparsers()
    module = importlib.import_module(f"phi3_training.commands.{group.module}")
    getattr(module, group.register)(subparsers)
    assert list(subparsers.choices) == list(group.commands)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_needs(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "_ARGCOMPLETE" in said
    assert "phi3" in said


@pytest.mark.patient
@pytest.mark.parametrize(
    ("line", "offered"), [("phi3 data c", {"check", "convert"}), ("phi3 use k", {"kettle"})]
)
def test_a_tab_completes_commands_and_runs(line: str, offered: set[str], tmp_path: Path) -> None:
    """In a process of its own: argcomplete takes over the file descriptors 8 and 9."""
    for name in ("kettle", "shop"):
        Run.open(tmp_path / "runs" / name).file("dataset.json").write_text("{}")
    answer = tmp_path / "answer"
    typed = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n"}
    typed |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    typed |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "PHI3_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-m", "phi3_training.cli"]
    done = subprocess.run(command, env={**os.environ, **typed}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {word.strip() for word in answer.read_text().splitlines()} == offered
