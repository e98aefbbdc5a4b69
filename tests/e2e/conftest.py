"""One `phi3 up` in a fresh HOME and a fresh folder, shared by the end-to-end tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

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
        self, *command: str, feed: str | None = None, timeout: float = 240, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `phi3 …` or `pf …` as a user would type it."""
        tool = {
            "phi3": [sys.executable, "-m", "phi3_training.cli"],
            "pf": [str(Path(sys.executable).with_name("pf"))],
        }[command[0]]
        done = subprocess.run(
            [*tool, *command[1:]],
            input=feed,
            stdin=subprocess.DEVNULL if feed is None else None,
            capture_output=True,
            text=True,
            cwd=self.work,
            env=self.environment(**extra),
            timeout=timeout,
            check=False,
        )
        self.printed.append(done.stdout + done.stderr)
        return done

    def environment(self, **extra: str) -> dict[str, str]:
        names = ("PATH", "LANG", "TMPDIR")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {
            **kept,
            "HOME": str(self.home),
            "PF_HOME_DIRECTORY": str(self.home / ".promptflow"),
            # No package index: a recipe that wants pretrained weights takes the tiny model.
            "PIP_NO_INDEX": "1",
            "PYTHONPATH": os.pathsep.join([str(PROJECT / "tools"), str(PROJECT / "training")]),
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
    """What the first `phi3 up` gave."""

    laptop: Laptop
    done: subprocess.CompletedProcess[str]
    seconds: float

    @property
    def run_folder(self) -> Path:
        return self.laptop.work / "runs" / "phi3-tiny"


PLANTED_KEY = "planted-Key-5d1f0c7a9be84c62"


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    """`phi3 up` with a planted key, so that a leak anywhere can be found."""
    laptop = Laptop(tmp_path_factory.mktemp("fresh-home"), tmp_path_factory.mktemp("fresh-work"))
    started = time.monotonic()
    try:
        done = laptop.run(*UP, PHI3_KEY=PLANTED_KEY)
        yield Journey(laptop, done, time.monotonic() - started)
    finally:
        laptop.run("phi3", "down")
        left = laptop.processes()
        for process in left:
            process.terminate()
        psutil.wait_procs(left, timeout=10)
