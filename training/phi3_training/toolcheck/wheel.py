"""The wheel: built from a copy of the sources, and what it must contain.

Reads the clone; writes the copy and the wheel into the folder it is given.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..doctor.finding import Finding, Group
from ..errors import StageError

GROUP = Group("wheel")
SOURCES = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "tools", "flows", "connections"),
    *("training/phi3_training", "training/recipes", "training/data"),
)
NEVER = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".promptflow")
ENTRY_POINTS = "package_tools"
#: What Prompt flow needs of the package; each with what leaves it out.
NEEDED = (
    ("phi3_tool/chat.py", "`packages` and `package_dir` in setup.py"),
    ("phi3_tool/connection_type.py", "`packages` and `package_dir` in setup.py"),
    ("phi3_tool/registry.py", "`packages` and `package_dir` in setup.py"),
    ("phi3_tool/yamls/phi3_chat.yaml", '"yamls/*.yaml" under `package_data` in setup.py'),
    ("phi3_tool/icons/phi3_chat_light.png", '"icons/*.png" under `package_data` in setup.py'),
    ("phi3_tool/icons/phi3_chat_dark.png", '"icons/*.png" under `package_data` in setup.py'),
    ("phi3_tool/py.typed", '"py.typed" under `package_data` in setup.py'),
)
BUILD_SECONDS = 300
_SETUPTOOLS = 77  # what pyproject.toml asks for
_NEEDS = f"setuptools>={_SETUPTOOLS}"


def build(project: Path, folder: Path) -> Path:
    """Build the wheel of `project` below `folder`; StageError with the builder's last words."""
    source = folder / "source"
    for name in SOURCES:
        _copy(project / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder / "wheel")]
    if _has_setuptools():
        command.append("--no-build-isolation")  # needs no network
    done = run([*command, str(source)], BUILD_SECONDS, "The build of the wheel")
    wheels = list((folder / "wheel").glob("*.whl"))
    if done.returncode or not wheels:
        reason = last_line(done.stderr, done.stdout)
        fix = "" if _has_setuptools() else f' (no network is needed with: pip install "{_NEEDS}")'
        raise StageError(f"The wheel cannot be built: {reason}{fix}")
    return wheels[0]


def contents(wheel: Path) -> Iterator[Finding]:
    """Whether everything that Prompt flow looks for is in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        marked = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        text = archive.read(marked[0]).decode() if marked else ""
    missing = [(name, home) for name, home in NEEDED if name not in names]
    for name, home in missing:
        yield GROUP.fault("files", f"{name} is not in {wheel.name}", f"look at {home}")
    if not missing:
        yield GROUP.ok("files", f"{wheel.name}: code, description and icons of the tool")
    points = configparser.ConfigParser()
    points.read_string(text)
    if points.has_section(ENTRY_POINTS) and points.options(ENTRY_POINTS):
        yield GROUP.ok("entry point", "; ".join(points[ENTRY_POINTS].values()))
    else:
        yield GROUP.fault(
            "entry point",
            f"{wheel.name} names no function under {ENTRY_POINTS!r}, so Prompt flow never loads it",
            '"package_tools": ["phi3_tool = phi3_tool.registry:list_package_tools"] under'
            " `entry_points` in setup.py",
        )


def run(command: list[str], seconds: int, what: str) -> subprocess.CompletedProcess[str]:
    """Run one of our own command lines; StageError where it does not end in time."""
    try:
        return subprocess.run(  # noqa: S603 - our own command line
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise StageError(f"{what} did not finish within {seconds} s; try again") from None


def last_line(*texts: str) -> str:
    """The last line that says something; `error:` lines before others."""
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("×", "╰"))]
    return (errors or lines or ["no reason given"])[-1]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=NEVER)
    elif source.is_file():
        shutil.copy(source, target)
    else:
        raise StageError(
            f"The wheel cannot be built: {source} is missing; run phi3 in a clone of"
            " phi3-promptflow"
        )


def _has_setuptools() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= _SETUPTOOLS
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
