"""`phi3 data check` and `show`: reads chat files and tells what is in them. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import SHOWN_FAULTS, DataError
from .compare import Seen
from .conversation import Conversation
from .faults import Fault, in_order, shown
from .read import ChatFile, read_checked


@dataclass(frozen=True)
class FileReport:
    """What one file holds; `rows` are its sound conversations."""

    path: Path
    rows: int
    several_turns: int
    formats: dict[str, int]
    size: int
    sha256: str
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        found = _count(len(self.faults), "fault") if self.faults else "no fault"
        formats = f" ({', '.join(self.formats)}; {self.several_turns} with several turns)"
        rows = _count(self.rows, "conversation") + (formats if self.rows else "")
        return f"{shown(self.path)}: {rows}, {found}"

    def as_dict(self) -> dict[str, Any]:
        """For `-o json`."""
        return {
            "file": str(self.path),
            "rows": self.rows,
            "several_turns": self.several_turns,
            "formats": self.formats,
            "bytes": self.size,
            "sha256": self.sha256,
            "faults": len(self.faults),
        }


@dataclass(frozen=True)
class CheckReport:
    """All files of one check and all their faults, in order."""

    files: tuple[FileReport, ...]

    @property
    def faults(self) -> list[Fault]:
        """Every fault of every file."""
        return in_order(fault for file in self.files for fault in file.faults)

    def lines(self) -> list[str]:
        """For people: one line per file, then the first faults."""
        faults = self.faults
        lines = [str(file) for file in self.files]
        lines += [f"  {fault}" for fault in faults[:SHOWN_FAULTS]]
        if len(faults) > SHOWN_FAULTS:
            lines.append(f"  … and {len(faults) - SHOWN_FAULTS} more (all of them: -o json)")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For `-o json`: nothing is left out."""
        return {
            "files": [file.as_dict() for file in self.files],
            "faults": [fault.as_dict() for fault in self.faults],
        }


def check(paths: Sequence[Path]) -> CheckReport:
    """Read all files to their ends and report what is in them and every fault."""
    seen = Seen()
    return CheckReport(tuple(_check_file(ChatFile(path), seen) for path in paths))


def show(path: Path, count: int) -> list[Conversation]:
    """The first sound conversations of a file.

    Raises DataError with every fault met when there is no sound one.
    """
    file = ChatFile(path)
    found = list(islice(file.conversations(), count))
    if not found and file.faults:
        raise DataError(in_order(file.faults))
    return found


def _check_file(file: ChatFile, seen: Seen) -> FileReport:
    for _ in read_checked(file, seen):
        pass
    return FileReport(
        path=file.path,
        rows=file.rows,
        several_turns=file.several_turns,
        formats=dict(file.formats),
        size=file.size,
        sha256=file.sha256,
        faults=tuple(in_order(file.faults)),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
