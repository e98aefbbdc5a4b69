"""Faults of chat files: where, what, and what fixes it. Writes the full report of a run.

A `Problem` is a fault that does not know its file and line yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..run import write_atomically


class Problem(NamedTuple):
    """What is wrong with a row, and the fix; `column` counts characters from 1."""

    kind: str
    what: str
    fix: str
    column: int | None = None


@dataclass(frozen=True)
class Fault:
    """One fault of one file. Line 0 means the file as a whole; `kind` is a stable name."""

    path: Path
    line: int
    kind: str
    what: str
    fix: str
    column: int | None = None
    row: int | None = None  # its number, from 1, where several rows may share a line

    @classmethod
    def at(cls, path: Path, line: int, problem: Problem, row: int = 0) -> Fault:
        """The problem, found at this place."""
        details = problem.kind, problem.what, problem.fix, problem.column
        return cls(path, line, *details, row or None)

    def __str__(self) -> str:
        return f"{self.place}: {self.what}; {self.fix}"

    @property
    def place(self) -> str:
        """`file`, `file:line` or `file:line:column`, as editors open it, and the row's number."""
        return place(self.path, self.line, self.row or 0, self.column)

    def as_dict(self) -> dict[str, object]:
        """For `-o json`."""
        return {
            "file": str(self.path),
            "line": self.line or None,
            "row": self.row,
            "column": self.column,
            "kind": self.kind,
            "what": self.what,
            "fix": self.fix,
        }


def place(path: Path, line: int, row: int = 0, column: int | None = None) -> str:
    """A place as a person reads it; the row is named where it is not the line."""
    where = ":".join([shown(path), *(str(n) for n in (line, column) if n)])
    return f"{where} (row {row})" if row and row != line else where


def shown(path: Path) -> str:
    """The path as a person would type it: relative if it is below the current folder."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):
        return str(path)


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """Faults by file (in the order first met), then by line and column."""
    faults = list(faults)
    rank: dict[Path, int] = {}
    for fault in faults:
        rank.setdefault(fault.path, len(rank))
    return sorted(
        faults, key=lambda fault: (rank[fault.path], fault.line, fault.row or 0, fault.column or 0)
    )


def write_report(path: Path, faults: Sequence[Fault]) -> None:
    """Every fault, one line each, in one file."""
    write_atomically(path, "".join(f"{fault}\n" for fault in faults))
