"""The wheel alone, in an empty folder: the recipes, chats and flow in it suffice for `up`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.integration.wheel import built_wheel

from phi3_training.cli import main

PROJECT = Path(__file__).resolve().parents[2]
QUICK = ["base.num_train_epochs=1", "finetune.num_train_epochs=1", "evaluate.max_rows=3"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files as an installation lays them out, far from the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built_wheel()) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture
def phi3(installed: Path, tmp_path: Path) -> Iterator[Run]:
    """`phi3` of that installation in an empty folder with a HOME of its own."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    environment |= {"HOME": str(home), "PF_HOME_DIRECTORY": str(home / ".promptflow")}
    environment |= {"PYTHONPATH": str(installed), "PIP_NO_INDEX": "1"}

    def run(*words: str, folder: Path = work) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "phi3_training.cli", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    yield run
    if (work / "runs").exists():
        run("down")


def test_a_plan_needs_no_clone(phi3: Run) -> None:
    planned = phi3("plan", "tiny")
    assert planned.returncode == 0, planned.stdout + planned.stderr


@pytest.mark.slow  # half a minute of CPU time
def test_up_needs_no_clone(phi3: Run, installed: Path) -> None:
    before = {path for path in installed.rglob("*") if "__pycache__" not in path.parts}
    done = phi3("up", "tiny", *QUICK, "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = phi3("chat", "Who founded Microsoft?")
    assert asked.returncode == 0, asked.stderr
    # Nothing is written beside the installed program, which may be another user's.
    after = {path for path in installed.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


def test_recipes_are_listed(phi3: Run) -> None:
    listed = phi3("recipes").stdout
    shipped = [path.name for path in (PROJECT / "training/recipes").glob("*.yaml")]
    assert shipped
    assert all(name in listed for name in shipped)


def test_init_writes_a_project_that_stands_alone(phi3: Run, tmp_path: Path) -> None:
    made = phi3("init", "mine")
    assert made.returncode == 0, made.stderr
    own = tmp_path / "work" / "mine"
    planned = phi3("plan", "recipe.yaml", folder=own)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    checked = phi3("data", "check", "data/outdoor_chats.jsonl", folder=own)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert (own / "flows/phi3_chat/../../tools/phi3_tool/client.py").is_file()
    handbook = PROJECT / "training/data/handbook"
    copied = sorted(path.name for path in (own / "data/handbook").iterdir())
    assert copied == sorted(path.name for path in handbook.iterdir())
    assert (own / "data/handbook_questions.jsonl").is_file()
    assert (own / "data/handbook_changes.json").is_file()
    assert "/runs/" in (own / ".gitignore").read_text("utf-8")
    assert str(PROJECT) not in (own / "recipe.yaml").read_text("utf-8")


def test_init_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me", "utf-8")
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
