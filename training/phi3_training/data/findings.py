"""What becomes of repeated rows, and what else is worth a warning. Reads scans and their Table.

Faults stop the work, removed rows are left out and listed, warnings are only told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..recipe_data import HubSet
from .arrays import U64, Bools
from .faults import Fault, Problem, in_order, shown
from .personal import NAMES
from .repeats import Pairs, Repeats, find
from .scan import Scan
from .table import Table


@dataclass(frozen=True)
class Rules:
    """What is done with repeats: `auto` goes by where a row is from."""

    duplicates: str = "auto"
    near_duplicates: str = "auto"

    def removes(self, one: Scan) -> bool:
        """Whether exact duplicates (and leaks) are taken out rather than refused."""
        if self.duplicates == "auto":  # nobody can mend a set of the hub
            return isinstance(one.source, HubSet)
        return self.duplicates == "remove"

    def removes_near(self, one: Scan) -> bool:
        """Whether near-duplicates are taken out rather than told."""
        if self.near_duplicates == "auto":
            return isinstance(one.source, HubSet)
        return self.near_duplicates == "remove"


class Findings:
    """All that was found in some scans."""

    def __init__(self, scans: list[Scan], rules: Rules) -> None:
        self.table = Table(scans)
        self._repeats: Repeats = find(self.table)
        sources = self.table.source
        removes = np.array([rules.removes(one) for one in scans], np.bool_)
        removes_near = np.array([rules.removes_near(one) for one in scans], np.bool_)
        self._held = self.table.in_part("validation")
        self._removed: list[tuple[str, Pairs]] = []
        self._refused: list[tuple[str, Pairs]] = []
        self._told: list[tuple[str, Pairs]] = []
        for kind, pairs, taken, otherwise in (
            ("duplicate", self._repeats.duplicates, removes, self._refused),
            ("leak", self._repeats.leaks, removes, self._refused),
            ("near-duplicate", self._repeats.near, removes_near, self._told),
        ):
            out = taken[sources[pairs.rows]] if len(pairs.rows) else np.zeros(0, np.bool_)
            self._removed.append((kind, Pairs(pairs.rows[out], pairs.others[out])))
            otherwise.append((kind, Pairs(pairs.rows[~out], pairs.others[~out])))

    @property
    def keep(self) -> Bools:
        """Which rows of the table stay."""
        keep = np.ones(len(self.table), np.bool_)
        for _, pairs in self._removed:
            keep[pairs.rows] = False
        return keep

    @property
    def groups(self) -> U64:
        """Equal for rows that may not be parted: the same question, or nearly the same text."""
        keys = self.table.question.copy()
        pairs = self._repeats.near
        for row, other in zip(pairs.rows.tolist(), pairs.others.tolist(), strict=True):
            keys[row] = keys[other]
        return keys

    def faults(self) -> list[Fault]:
        """Every fault, by file and line."""
        faults = [fault for one in self.table.scans for fault in one.faults]
        return in_order([*faults, *self._repeated(self._refused)])

    def removed(self) -> Iterator[Fault]:
        """Each row that was left out, and why."""
        return self._repeated(self._removed)

    def warnings(self) -> Iterator[Fault]:
        """What to look at: rows nearly alike, and what looks like personal data."""
        yield from self._repeated(self._told)
        for one in self.table.scans:
            for digest, first in zip(one.digests, one.firsts, strict=True):
                for line, kind, masked in digest.flags:
                    yield Fault.at(one.path, line + first, _personal(NAMES[kind], masked))

    def counts(self) -> dict[str, dict[str, int]]:
        """How many rows were removed and how many warnings there are, by kind."""
        flags: Counter[str] = Counter()
        for one in self.table.scans:
            for digest in one.digests:
                flags.update(f"personal-data: {NAMES[kind]}" for _, kind, _ in digest.flags)
        told = {**_sizes(self._told), **dict(sorted(flags.items()))}
        return {"removed": _sizes(self._removed), "warnings": told}

    def _repeated(self, lists: list[tuple[str, Pairs]]) -> Iterator[Fault]:
        for kind, pairs in lists:
            for row, other in zip(pairs.rows.tolist(), pairs.others.tolist(), strict=True):
                problem = self._problem(kind, row, other)
                yield Fault.at(*self.table.place(row), problem)

    def _problem(self, kind: str, row: int, other: int) -> Problem:
        path, line = self.table.place(other)
        first = f"{shown(path)}:{line}"
        if kind == "duplicate":
            mend = "keep one of the two, or set data.duplicates=remove"
            return Problem(kind, f"the same conversation as {first}", mend)
        if kind == "leak":
            what = f"held out, but {first} trains on the same question in the same context"
            mend = "take it out of one of the two sets: a figure on trained questions tells nothing"
            return Problem(kind, what, mend)
        if self._held[row] and not self._held[other]:
            what = f"held out, but nearly the same as {first}, which is trained on"
            return Problem("near-leak", what, "take it out of one of the two sets")
        what = f"nearly the same conversation as {first}"
        return Problem(kind, what, "keep one of the two, or set data.near_duplicates=remove")


def _sizes(lists: list[tuple[str, Pairs]]) -> dict[str, int]:
    return {kind: len(pairs.rows) for kind, pairs in lists if len(pairs.rows)}


def _personal(what: str, masked: str) -> Problem:
    mend = "take it out, or put a made-up one in its place"
    return Problem("personal-data", f"there seems to be {what} in it ({masked})", mend)


def write_findings(path: Path, findings: Findings) -> bool:
    """Write each removed row and each warning, one line each; False if there is none."""
    count = 0
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as stream:
        for fault in findings.removed():
            stream.write(f"removed: {fault.place}: {fault.what}\n")
            count += 1
        for fault in findings.warnings():
            stream.write(f"warning: {fault}\n")
            count += 1
    if count:
        temporary.replace(path)
    else:
        temporary.unlink()
        path.unlink(missing_ok=True)
    return count > 0


def sentences(counts: Mapping[str, Mapping[str, Any]], report: str) -> list[str]:
    """The counts for people, one line per kind."""
    removed = [f"removed: {_rows(n)} ({kind})" for kind, n in counts["removed"].items()]
    told = [f"warning: {_rows(n)} ({kind})" for kind, n in counts["warnings"].items()]
    return [f"{line}, listed in {report}" for line in (*removed, *told)]


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"
