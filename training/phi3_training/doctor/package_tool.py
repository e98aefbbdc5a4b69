"""Smoke test of the package tool: builds the wheel, installs it alone and looks for the tool there.

Reads the clone; writes into a temporary folder. Starts pip and one Python (package_probe.py); only
a new environment needs the network.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from ..errors import MissingExtraError, Phi3TrainingError, StageError
from ..packages import installed
from .finding import Finding, Group

_TOOL = Group("tool")
_SOURCES = [
    *["setup.py", "pyproject.toml", "README.md", "LICENSE"],
    *["tools", "agents", "flows", "connections"],
    *["training/phi3_training", "training/recipes", "training/data"],
]
_NEVER = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".promptflow")
_SETUPTOOLS = "77"  # what pyproject.toml asks for


def check_tool(project: Path, *, new_environment: bool = False) -> Iterator[Finding]:
    """Build the wheel of the clone `project`, install it, and look for the tool in it."""
    fix = "fix that, then: phi3 doctor --tool"
    with tempfile.TemporaryDirectory(prefix="phi3-tool-") as scratch:
        folder = Path(scratch)
        try:
            wheel = build(project, folder)
            yield Group("wheel").ok("build", wheel.name)
        except StageError as error:
            yield Group("wheel").fault("build", str(error), fix)
            return
        try:
            if new_environment:
                home = folder / "new"
                python = install_new(wheel, home, project / "constraints/local.txt")
                yield _TOOL.ok("install", "installed with its extra `flow` into a new environment")
            else:
                python, home = Path(sys.executable), install_alone(wheel, folder)
                said = "installed separately, with this environment's Prompt flow"
                yield _TOOL.ok("install", said)
            yield from search(python, home)
        except Phi3TrainingError as error:
            yield _TOOL.fault("install", str(error), fix)


def build(project: Path, folder: Path) -> Path:
    """Build the wheel of `project` from a copy; StageError with the builder's last words."""
    # From a copy: setuptools writes build/ and *.egg-info next to what it builds.
    source = folder / "source"
    for name in _SOURCES:
        if not (project / name).exists():
            raise StageError(
                f"The wheel cannot be built: {project / name} is missing; run phi3 in a clone of"
                " phi3-promptflow"
            )
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (project / name).is_dir():
            shutil.copytree(project / name, source / name, ignore=_NEVER)
        else:
            shutil.copy(project / name, source / name)
    options = ["--no-deps", "--wheel-dir", str(folder / "wheel")]
    reason = ""
    # A build in this environment needs no network; with an older setuptools pip fetches one.
    if Version(installed("setuptools") or "0") >= Version(_SETUPTOOLS):
        options.append("--no-build-isolation")
    else:
        reason = f' (no network is needed with: pip install "setuptools>={_SETUPTOOLS}")'
    pip = [sys.executable, "-m", "pip", "wheel"]
    _run([*pip, *options, str(source)], 300, "The wheel cannot be built", reason)
    return next((folder / "wheel").glob("*.whl"))


def install_alone(wheel: Path, folder: Path) -> Path:
    """Install only the wheel below `folder`; all else is this environment's. Returns its path."""
    if importlib.util.find_spec("promptflow") is None:
        raise MissingExtraError("promptflow", "flow")
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    _run([*pip, "--target", str(target), str(wheel)], 120, "The wheel cannot be installed")
    return target


def install_new(wheel: Path, home: Path, constraints: Path) -> Path:
    """The Python of a new environment at `home`, with the wheel and its extra `flow`."""
    try:
        venv.create(home, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise StageError(f"No new environment can be created here: {error}") from None
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = [str(python), "-m", "pip", "install", "--constraint", str(constraints)]
    _run([*pip, f"{wheel}[flow]"], 1800, "The wheel cannot be installed")
    return python


def search(python: Path, folder: Path) -> Iterator[Finding]:
    """Look for the tool below `folder`; StageError if the search itself fails."""
    probe = Path(__file__).with_name("package_probe.py")
    # -I: neither PYTHONPATH nor the current folder may lead to the clone.
    command = [str(python), "-I", str(probe), str(folder)]
    said = _run(command, 120, "The search for the tool failed")
    for check, ok, text, fix in json.loads(said.splitlines()[-1]):
        yield _TOOL.ok(check, text) if ok else _TOOL.fault(check, text, fix)


def _run(command: list[str], seconds: int, failure: str, hint: str = "") -> str:
    """The output of one of our own command lines; StageError with the reason it gives."""
    if "pip" in command:
        command = [*command, "--quiet", "--disable-pip-version-check"]
    try:
        done = subprocess.run(  # noqa: S603 - our own command line
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise StageError(f"{failure}: not done within {seconds} s; try again") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # pip's last line is advice; the reason is the last line with the word Error.
        errors = [line for line in lines if "Error" in line]
        raise StageError(f"{failure}: {(errors or lines or ['no reason given'])[-1]}{hint}")
    return done.stdout
