"""Processes that find no Prompt flow, as after `pip install "phi3-promptflow[local]"` alone."""

from __future__ import annotations

from pathlib import Path

# Python imports this at its start, in every process that has the folder on its path. What the
# extra `flow` installs, and `local` does not, is then neither imported nor listed.
_BLOCKED = """\
import importlib.metadata, sys
GONE = ("promptflow", "keyring", "keyrings")
sys.modules.update(dict.fromkeys(GONE))
listed = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.startswith(GONE):
        raise importlib.metadata.PackageNotFoundError(name)
    return listed(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


def block_promptflow(folder: Path) -> str:
    """Write what blocks it into a folder; that folder goes to the front of PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(_BLOCKED, "utf-8")
    return str(folder)
