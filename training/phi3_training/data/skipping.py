"""Rows that are refused, skipped or cut: `data.bad_rows`, `data.too_long`, `data.max_skipped`.

Decides for rows that were scanned; what a tokenizer has to say comes from above as TokenRules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..recipe import DataSection
from .arrays import U8, Ints
from .faults import Fault, Problem
from .findings import Findings
from .scan import Table
from .sources import Reading, Source

TOO_LONG = "too-long"

# Every row of a set of this many is asked for; of a larger one those that may be too long, and a
# sample: what else the audit finds is the fault of a template, and then of nearly all rows.
EVERY_ROW = 20_000
SAMPLE = 1000
_BATCH = 1000  # conversations in memory at once
_LONGER = 64  # bytes that a rewording adds at most
# After these the rest of a file was not read; of JSON lines and tables only a line was not.
_OF_A_LINE = {"broken-json", "line-too-long", "not-utf8"}
_END_READING = _OF_A_LINE | {"broken-parquet", "broken-arrow", "broken-gzip"}


class TokenRules(Protocol):
    """What a tokenizer says of conversations; `limit` is in tokens."""

    limit: int
    parts: Collection[str]

    def broken(
        self, part: str, conversations: Sequence[list[dict[str, str]]]
    ) -> Iterator[tuple[int, Problem]]:
        """The numbers of conversations that cannot be trained on as they are, and why."""


@dataclass
class Verdict:
    """What becomes of rows with faults; `rows` are the numbers of sound ones that are skipped."""

    faults: list[Fault] = field(default_factory=list)
    skipped: list[Fault] = field(default_factory=list)
    cut: list[Fault] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def removed(self) -> dict[str, int]:
        """How many rows were skipped, by key."""
        rows = {(fault.path, fault.line, fault.row): fault.kind for fault in self.skipped}
        long = sum(kind == TOO_LONG for kind in rows.values())
        counts = {"data.bad_rows": len(rows) - long, "data.too_long": long}
        return {key: count for key, count in counts.items() if count}


def judge(
    data: DataSection,
    findings: Findings,
    target: U8,
    numbers: dict[str, int],
    rules: TokenRules | None,
) -> Verdict:
    """Sort the faults of rows; `numbers` names the parts that `target` has for each row.

    Above `data.max_skipped` of a part, everything that would be skipped is a fault.
    """
    verdict = Verdict()
    scans = {scanned.path: scanned for scanned in findings.table.scans}
    of_scans = {fault for scanned in findings.table.scans for fault in scanned.faults}
    for fault in findings.faults():
        skips = bool(
            data.bad_rows == "skip"
            and fault in of_scans
            and fault.line  # 0: of the whole file
            and not ends_reading(scans[fault.path].source, fault)
        )
        (verdict.skipped if skips else verdict.faults).append(fault)
    if rules is not None:
        judge_tokens(data, findings.table, target, numbers, rules, verdict)
    for part in numbers:
        paths = {
            scanned.path: scanned.rows for scanned in findings.table.scans if scanned.part == part
        }
        lines = {(f.path, f.line, f.row) for f in verdict.skipped if f.path in paths}
        unread = {
            (f.path, f.line, f.row) for f in verdict.skipped if f in of_scans and f.path in paths
        }
        reason = too_many(len(lines), sum(paths.values()) + len(unread), data.max_skipped)
        if reason:
            fix = "correct them, or raise data.max_skipped"
            path = next(f.path for f in verdict.skipped if f.path in paths)
            verdict.faults.append(Fault(path, 0, "too-many-skipped", reason, fix))
            verdict.faults += [f for f in verdict.skipped if f.path in paths]
            verdict.skipped = [f for f in verdict.skipped if f.path not in paths]
    return verdict


def too_many(skipped: int, rows: int, ceiling: float) -> str:
    """Why so many rows may not be skipped; empty where they may."""
    if not skipped or skipped <= ceiling * rows:
        return ""
    share = f"{skipped} of {rows} rows ({skipped / rows:.1%})"
    return f"{share} would be skipped; data.max_skipped allows {ceiling:.1%}"


def ends_reading(source: Source, problem: Fault | Problem) -> bool:
    """Whether what comes after the problem was not read, so that more than a row is lost."""
    if "the rest was not read" in problem.what:
        return True
    if problem.kind not in _END_READING:
        return False
    return problem.kind not in _OF_A_LINE or Reading.of(source).kind == "document"


def judge_tokens(
    data: DataSection,
    table: Table,
    target: U8,
    numbers: dict[str, int],
    rules: TokenRules,
    verdict: Verdict,
) -> None:
    """Add to the verdict what a tokenizer says of the rows of each part."""
    for part, number in numbers.items():
        if part not in rules.parts:
            continue
        rows = worth_asking(table, np.flatnonzero(target == number), rules.limit)
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH].tolist()
            turns = [[m.to_dict() for m in table.conversation(row).messages] for row in batch]
            for index, problem in rules.broken(part, turns):
                row = batch[index]
                fault = Fault.at(*table.place(row), problem, int(table.number[row]))
                choice = data.too_long if problem.kind == TOO_LONG else data.bad_rows
                if choice == "refuse":
                    verdict.faults.append(fault)
                elif choice == "cut":
                    verdict.cut.append(fault)
                else:
                    verdict.skipped.append(fault)
                    verdict.rows.append(row)


def worth_asking(table: Table, rows: Ints, limit: int) -> Ints:
    """The rows that are encoded: all, or of a large set those that can be beyond the limit.

    A row has no more tokens than its JSON has bytes: no token of a model with byte fallback is
    less than a byte, and JSON's braces and names outweigh a template's marks.
    """
    if len(rows) <= EVERY_ROW:
        return rows
    sample = rows[np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64)]
    return np.union1d(rows[table.size[rows] + _LONGER > limit], sample)
