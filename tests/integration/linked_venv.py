"""Virtual environments made of links to what is installed here: clean, at once, without network.

A file by file copy in links, for packages that share a folder; nothing but what is named gets in.
"""

from __future__ import annotations

import re
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def linked_venv(folder: Path, names: Iterable[str]) -> Path:
    """A virtual environment of these distributions; its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    for name in names:
        _link(distribution(name), site)
    return folder / "bin" / "python"


def closure(*names: str) -> list[str]:
    """These distributions and all that they require here."""
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = _plain(waiting.pop())
        if name in found:
            continue
        if missing([name]):
            continue
        found[name] = None
        for text in distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return list(found)


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


def _link(dist: Distribution, site: Path) -> None:
    for file in dist.files or ():
        target = site / file
        if ".." not in file.parts and target.suffix != ".pth" and not target.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(str(dist.locate_file(file)))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
