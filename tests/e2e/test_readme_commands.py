"""The README's commands, typed as they stand there, after its one `up`."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from .conftest import PLANTED_KEY, PROJECT, UP, Journey

README = (PROJECT / "README.md").read_text("utf-8")
COMMAND = re.compile(r"\.venv/bin/((?:phi3|pf) [^`\n)]+)")
# Never end by themselves; each has a test of its own that drives it.
LASTING = ("--ui", "--web", "--interactive", "phi3 serve")
# A run of a few seconds; so little training does not pass the gate.
QUICK = ["finetune.num_train_epochs=1", "evaluate.max_rows=5", "--force"]


def commands(heading: str) -> list[str]:
    """What the section of that heading tells a user to type."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    typed = [command for command in COMMAND.findall(section) if command.split()[1] != "down"]
    return [command for command in typed if not any(word in command for word in LASTING)]


@pytest.mark.parametrize("command", commands("What you can do next"))
def test_what_you_can_do_next(journey: Journey, command: str) -> None:
    words = [word.replace("flows/", f"{PROJECT}/flows/") for word in shlex.split(command)]
    question = "Who founded Microsoft?\n" if words[:2] == ["phi3", "chat"] else None

    done = journey.laptop.run(*words, feed=question)
    if words[:2] == ["phi3", "env"]:
        journey.laptop.printed.pop()  # showing the key is what this command is for

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_your_own_chats(journey: Journey) -> None:
    """With a file of one's own: checked, then trained on."""
    mine = journey.laptop.work / "my_chats.jsonl"
    mine.write_text(Path(PROJECT, "training/data/outdoor_chats.jsonl").read_text("utf-8"))
    check, up = (shlex.split(command) for command in commands("Your own chats"))

    checked = journey.laptop.run(*check)
    assert checked.returncode == 0, checked.stderr
    trained = journey.laptop.run(*up, *QUICK, PHI3_KEY=PLANTED_KEY)
    assert trained.returncode == 0, trained.stderr
    assert journey.laptop.run("phi3", "down", "mine").returncode == 0
    # The other tests know of one run, and that one has the connection.
    shutil.rmtree(journey.laptop.work / "runs" / "mine")
    assert journey.laptop.run(*UP, PHI3_KEY=PLANTED_KEY).returncode == 0
