"""Where the wheel is tried: with this environment's Prompt flow, or in a new environment.

Writes into the folder it is given; only the new environment needs the network.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from ..errors import StageError
from .wheel import last_line, run

SECONDS = 120
FRESH_SECONDS = 1800


@dataclass(frozen=True)
class Place:
    """A Python to ask, and the folder that the wheel's code must come from."""

    python: Path
    folder: Path
    said: str


def beside(wheel: Path, folder: Path) -> Place:
    """The wheel alone in a folder; everything else is this environment's, this project excepted."""
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    _pip([*pip, "--target", str(target), str(wheel)], SECONDS)
    said = "installed separately, with this environment's Prompt flow"
    return Place(Path(sys.executable), target, said)


def fresh(wheel: Path, folder: Path, constraints: Path | None) -> Place:
    """The wheel with its extra `flow` in a new virtual environment."""
    home = folder / "fresh"
    try:
        venv.create(home, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StageError(f"No new environment can be created here: {error}") from None
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [str(python), "-m", "pip", "install"]
    if constraints is not None and constraints.is_file():
        pip += ["--constraint", str(constraints)]
    _pip([*pip, f"{wheel}[flow]"], FRESH_SECONDS)
    return Place(python, home, "installed with its extra `flow` into a new environment")


def _pip(command: list[str], seconds: int) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    done = run([*command, *quiet], seconds, "The installation of the wheel")
    if done.returncode:
        reason = last_line(done.stderr, done.stdout)
        raise StageError(f"The wheel cannot be installed: {reason}")
