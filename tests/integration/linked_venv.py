"""Virtual environments made of links to what is installed here: clean, at once, without network.

`linked_venv` holds the named distributions and nothing else; `venv_without` everything but some.
"""

from __future__ import annotations

import re
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path


def linked_venv(folder: Path, names: Iterable[str]) -> Path:
    """A virtual environment of these distributions; its Python."""
    return _make(folder, [distribution(name) for name in names])


def venv_without(folder: Path, *left_out: str) -> Path:
    """A virtual environment of everything installed here but what these names begin; its Python."""
    kept = {}
    for dist in distributions():
        name = _plain(dist.metadata["Name"])
        if not name.startswith(left_out):
            kept.setdefault(name, dist)
    return _make(folder, list(kept.values()))


def pinned(requirements: Path) -> dict[str, str]:
    """Names and versions of a requirements file of exact pins."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    found = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name: version for name, _, version in found}


def missing(names: Iterable[str]) -> list[str]:
    """Those of the names that are not installed here."""
    absent = []
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            absent.append(name)
    return absent


def _make(folder: Path, dists: Iterable[Distribution]) -> Path:
    venv.create(folder, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    made: set[Path] = set()
    for dist in dists:
        for file in dist.files or ():
            target = site / file
            if ".." in file.parts or target.suffix == ".pth":
                continue
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            if not target.is_symlink():
                target.symlink_to(str(dist.locate_file(file)))
    return folder / "bin" / "python"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
