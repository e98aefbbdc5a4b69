"""The Python that has Agent Framework: found, and started with the endpoint in its environment.

Prompt flow needs opentelemetry-sdk below 1.39, Agent Framework opentelemetry-api from 1.39 on: one
environment cannot hold both. `make agent` makes the second one, .venv-agent.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import StageError, UsageError
from ..project import CLONE

#: Names the interpreter where it is in neither of the usual places.
PYTHON = "PHI3_AGENT_PYTHON"
FOLDER = ".venv-agent"
_PACKAGE = "agent_framework"


def agent_python(environ: Mapping[str, str] | None = None) -> Path:
    """The interpreter with Agent Framework in it.

    $PHI3_AGENT_PYTHON, else this one where it has the package, else .venv-agent in the current
    folder or in the clone. Raises UsageError or StageError with the command that makes one.
    """
    named = (os.environ if environ is None else environ).get(PYTHON, "").strip()
    if named:
        if not Path(named).is_file():
            raise UsageError(f"{PYTHON} names {named}, which does not exist")
        return Path(named)
    # By its spec: importing the framework takes half a second.
    if importlib.util.find_spec(_PACKAGE) is not None:
        return Path(sys.executable)
    python, packages = "bin/python", "lib/python3*/site-packages"
    if os.name == "nt":
        python, packages = "Scripts/python.exe", "Lib/site-packages"
    for folder in dict.fromkeys((Path.cwd() / FOLDER, CLONE / FOLDER)):
        # An interrupted installation has the folder alone.
        if (folder / python).is_file() and any(folder.glob(f"{packages}/{_PACKAGE}/__init__.py")):
            return folder / python
    if (CLONE / "Makefile").is_file():
        fix = "make agent"
    else:
        fix = (
            f"python3 -m venv {FOLDER} && {FOLDER}/bin/python -m pip install "
            '"phi3-promptflow[agent]"'
        )
    raise StageError(
        "Agent Framework is not installed. It needs an environment of its own, because Prompt flow "
        f"needs an older opentelemetry; make it once with: {fix} (or name a Python that has it: "
        f"{PYTHON}=…)"
    )


def command(python: Path, words: Sequence[str]) -> list[str]:
    """What starts `python -m phi3_agent` with these words; no secret is among them."""
    return [str(python), "-m", "phi3_agent", *words]


def environment(
    endpoint: Mapping[str, str], more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """This process's environment, with `endpoint` instead of the endpoint that it names.

    In a clone its sources come first, so that an older installation in the other environment is
    not used.
    """
    others = {name: value for name, value in os.environ.items() if name not in _ENDPOINT}
    clone = (CLONE / "Makefile").is_file()
    sources = [str(CLONE / name) for name in ("agents", "tools", "training")] if clone else []
    # What the user has set himself stays, after ours.
    path = os.pathsep.join([*sources, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**others, **({"PYTHONPATH": path} if path else {}), **endpoint, **(more or {})}


# All of them, so that a deployment or dialect that the shell names does not go with another
# endpoint.
_ENDPOINT = {
    f"PHI3_{name}"
    for name in ("ENDPOINT", "KEY", "DEPLOYMENT", "DIALECT", "CONTEXT_LENGTH", "AUTH")
}
