"""What several tests read and is made once for all workers of a test run, e.g. a trained model."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name, which `make(folder)` fills once; nobody may change what is in it.

    The worker that needs it first makes it, at the place where it stays; the others wait.
    """
    home = Path(os.environ["PHI3_TESTS_SHARED"])
    folder, done = home / name, home / f"{name}.done"
    with (home / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a `make` that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(folder, target, symlinks=True))
