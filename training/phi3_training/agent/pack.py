"""`phi3 agent pack`: a folder that Foundry's hosted agents can build and run.

Reads hosted_files/ and the sources of phi3_agent and phi3_tool; writes one folder, whole or not at
all. No key goes in.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..flow.bundle import BASE
from ..project import AGENT, TOOL, find

_FILES = Path(__file__).with_name("hosted_files")
# Foundry's rule for the name of an agent.
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
# What only this machine needs.
_NOT_HOSTED = (
    "__pycache__",
    "*.pyc",
    "__main__.py",
    "chat.py",
    "ui.py",
    "rows.py",
    "yamls",
    "icons",
)


@dataclass(frozen=True)
class Packed:
    """What was written."""

    folder: Path
    files: tuple[str, ...]


def pack_agent(out: Path, name: str) -> Packed:
    """Write OUT/NAME; raises UsageError for a name that Foundry refuses and a folder not ours."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name an agent: use letters, digits and dashes, at most 63, and no "
            "dash at either end"
        )
    folder = out / name
    if folder.exists() and not (folder / "agent.yaml").is_file():
        raise UsageError(f"{folder} exists and is no packed agent; choose another with --out")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}.") as scratch:
        staged = Path(scratch) / name
        staged.mkdir()
        # pip compiles main.py, so that an installed package has a __pycache__ here.
        for path in sorted(path for path in _FILES.iterdir() if path.is_file()):
            text = path.read_text(encoding="utf-8").replace("@BASE@", BASE).replace("@NAME@", name)
            target = ".dockerignore" if path.name == "dockerignore" else path.name
            (staged / target).write_text(text, encoding="utf-8")
        # Sources, not a package: Foundry builds the container, and no index has these.
        for source in (AGENT, TOOL):
            shutil.copytree(
                find(source), staged / source.name, ignore=shutil.ignore_patterns(*_NOT_HOSTED)
            )
        if folder.exists():
            folder.rename(Path(scratch) / "before")
        staged.rename(folder)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return Packed(folder, tuple(files))
