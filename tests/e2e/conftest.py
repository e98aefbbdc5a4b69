"""One `phi3 up` in a fresh HOME and a fresh folder, shared by the end-to-end tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from tests import forked
from tests.shared import shared

PROJECT = Path(__file__).resolve().parents[2]
# The model that is made in seconds; the pretrained one of the default recipe takes minutes.
UP = ("phi3", "up", str(PROJECT / "training/recipes/phi3-tiny.yaml"))


@dataclass
class Laptop:
    """A user's machine: a HOME, a working folder, and everything that was printed there."""

    home: Path
    work: Path
    printed: list[str] = field(default_factory=list)

    def run(
        self,
        *command: str,
        feed: str | None = None,
        timeout: float = 240,
        apart: bool = False,
        **extra: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run `phi3 …` or `pf …` as a user would type it.

        With its libraries already loaded; `apart`: in an interpreter of its own.
        """
        tool = {
            "phi3": [sys.executable, "-m", "phi3_training.cli"],
            "pf": [str(Path(sys.executable).with_name("pf"))],
        }[command[0]]
        words, env = [*tool, *command[1:]], self.environment(**extra)
        done = forked.run_or_start(
            words, feed=feed, cwd=self.work, env=env, timeout=timeout, apart=apart
        )
        self.printed.append(done.stdout + done.stderr)
        return done

    def environment(self, **extra: str) -> dict[str, str]:
        names = ("PATH", "LANG", "TMPDIR", "OMP_NUM_THREADS")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {
            **kept,
            "HOME": str(self.home),
            "PF_HOME_DIRECTORY": str(self.home / ".promptflow"),
            # No package index: a recipe that wants pretrained weights takes the tiny model.
            "PIP_NO_INDEX": "1",
            "PYTHONPATH": forked.PYTHONPATH,
            **extra,
        }

    def processes(self) -> list[psutil.Process]:
        """Every process that was started with this HOME and still lives."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("HOME") == str(self.home)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            return False


@dataclass
class Journey:
    """A run that was trained once for all workers, and is served on a laptop of this one's own."""

    laptop: Laptop
    first: subprocess.CompletedProcess[str]  # the `phi3 up` that trained it
    first_laptop: Path

    @property
    def run_folder(self) -> Path:
        return self.laptop.work / "runs" / "phi3-tiny"


PLANTED_KEY = "planted-Key-5d1f0c7a9be84c62"


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """`phi3 up` with a planted key, so that a leak anywhere can be found."""
    trained = shared("trained", _train)
    laptop = Laptop(tmp_path_factory.mktemp("fresh-home"), tmp_path_factory.mktemp("fresh-work"))
    shutil.copytree(trained / "work", laptop.work, dirs_exist_ok=True)
    first = json.loads((trained / "first.json").read_text())
    try:
        done = laptop.run(*UP, PHI3_KEY=PLANTED_KEY)
        assert done.returncode == 0, done.stderr
        yield Journey(laptop, subprocess.CompletedProcess(UP, **first), trained)
    finally:
        close(laptop)


def _train(folder: Path) -> None:
    """The whole `phi3 up`, in an interpreter of its own; what it serves is stopped again."""
    for name in ("home", "work"):
        (folder / name).mkdir()
    laptop = Laptop(folder / "home", folder / "work")
    try:
        done = laptop.run(*UP, apart=True, PHI3_KEY=PLANTED_KEY)
    finally:
        close(laptop)
    first = {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    (folder / "first.json").write_text(json.dumps(first))


def close(laptop: Laptop) -> None:
    """Stop what runs on a laptop."""
    laptop.run("phi3", "down")
    left = laptop.processes()
    for process in left:
        process.terminate()
    psutil.wait_procs(left, timeout=10)
