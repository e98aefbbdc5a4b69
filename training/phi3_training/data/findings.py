"""What becomes of rows that are repeated, faulty or too long. Reads scans and their Table.

Faults stop the run; removed, skipped and cut rows are listed (`data.duplicates`,
`data.near_duplicates`, `data.bad_rows`, `data.too_long`, `data.max_skipped`); warnings are only
reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, counted
from ..manifests import TokenLengths
from ..prompt import ChatFormat
from ..recipe import DataSection, HubSet
from . import faults
from .digest import BANDS, NAMES, U8, U64, Bools, Ints, Measure
from .faults import Fault, Problem, in_order
from .scan import Scan, Table
from .sources import Reading, Source

# Finds rows that are there twice, nearly twice, or on both sides of the split. Reads a Table.

_CHAIN = 4  # earlier texts with the same number that one is measured against
_MEASURED = 256  # texts whose runs are cached


class Pairs(NamedTuple):
    """Rows, each with an earlier row that it repeats."""

    rows: Ints
    others: Ints


class Repeats(NamedTuple):
    """What was found; a row is in one list at most."""

    duplicates: Pairs
    leaks: Pairs
    near: Pairs


def find(table: Table) -> Repeats:
    """Compare all rows. Trained rows (with replayed ones) and held-out rows are a set each.

    A leak is a held-out row whose question is trained on. Near-duplicates are looked for among
    all rows that are neither.
    """
    held = table.in_part("validation")
    identity = table.identity ^ held.astype(np.uint64)
    first = first_of(identity)
    repeated = first != np.arange(len(table))
    # For each held-out row a trained row with its question, or -1.
    asked = np.full(len(table), -1, np.int64)
    if held.any():
        trained, asking = np.flatnonzero(~held), np.flatnonzero(held)
        order = np.argsort(table.question[trained], kind="stable")
        questions = table.question[trained][order]
        place = np.searchsorted(questions, table.question[asking])
        inside = place < len(questions)
        same = np.zeros(len(asking), np.bool_)
        same[inside] = questions[place[inside]] == table.question[asking][inside]
        asked[asking[same]] = trained[order[place[same]]]
    leaking = (asked >= 0) & ~repeated
    measure = lru_cache(_MEASURED)(lambda row: Measure(table.body(row)))
    candidates = _candidates(table, ~repeated & ~leaking)
    like: dict[int, int] = {}
    for row in sorted(candidates):
        # A row like one that was found to be like another counts as like that first one.
        earlier = {like.get(other, other) for other in candidates[row]}
        for other in sorted(earlier):
            if not measure(row).near(measure(other)):
                continue
            mine, theirs = (table.conversation(n).messages for n in (row, other))
            # The same texts of which other answers are learnt (weight 0) are two lessons.
            same_texts = [m.content for m in mine] == [m.content for m in theirs]
            if mine == theirs or not same_texts:
                like[row] = other
                break
    near = Pairs(np.array(list(like), np.int64), np.array(list(like.values()), np.int64))
    return Repeats(
        Pairs(np.flatnonzero(repeated), first[repeated]),
        Pairs(np.flatnonzero(leaking), asked[leaking]),
        near,
    )


def first_of(keys: npt.NDArray[np.unsignedinteger]) -> Ints:
    """For each entry the number of the first one that equals it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.ones(len(keys), np.bool_)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = np.empty(len(keys), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _candidates(table: Table, wanted: Bools) -> dict[int, set[int]]:
    """Rows with earlier rows that they share a number of the sketch with."""
    candidates: dict[int, set[int]] = {}
    for band in range(BANDS):
        rows = np.flatnonzero(wanted & (table.bands[:, band] != 0))
        numbers = table.bands[rows, band]
        order = np.argsort(numbers, kind="stable")
        rows, numbers = rows[order], numbers[order]
        for back in range(1, _CHAIN + 1):
            same = np.flatnonzero(numbers[back:] == numbers[:-back])
            pairs = zip(rows[same + back].tolist(), rows[same].tolist(), strict=True)
            for row, other in pairs:
                candidates.setdefault(row, set()).add(other)
    return candidates


@dataclass(frozen=True)
class Rules:
    """What is done with repeats: `auto` goes by where a row is from."""

    duplicates: str = "auto"
    near_duplicates: str = "auto"

    def removes(self, scan: Scan) -> bool:
        """Whether exact duplicates (and leaks) are removed rather than refused."""
        if self.duplicates == "auto":  # nobody can fix a set of the hub
            return isinstance(scan.source, HubSet)
        return self.duplicates == "remove"

    def removes_near(self, scan: Scan) -> bool:
        """Whether near-duplicates are removed rather than reported."""
        if self.near_duplicates == "auto":
            return isinstance(scan.source, HubSet)
        return self.near_duplicates == "remove"


class Findings:
    """All that was found in some scans."""

    def __init__(self, scans: list[Scan], rules: Rules) -> None:
        self.table = Table(scans)
        self._repeats: Repeats = find(self.table)
        sources = self.table.source
        removes = np.array([rules.removes(scan) for scan in scans], np.bool_)
        removes_near = np.array([rules.removes_near(scan) for scan in scans], np.bool_)
        self._held = self.table.in_part("validation")
        self._removed: list[tuple[str, Pairs]] = []
        self._refused: list[tuple[str, Pairs]] = []
        self._reported: list[tuple[str, Pairs]] = []
        for kind, pairs, taken, otherwise in (
            ("duplicate", self._repeats.duplicates, removes, self._refused),
            ("leak", self._repeats.leaks, removes, self._refused),
            ("near-duplicate", self._repeats.near, removes_near, self._reported),
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
        faults = [fault for scan in self.table.scans for fault in scan.faults]
        return in_order([*faults, *self._repeated(self._refused)])

    def removed(self) -> Iterator[Fault]:
        """Each row that was left out, and why."""
        return self._repeated(self._removed)

    def warnings(self) -> Iterator[Fault]:
        """What to look at: rows nearly alike, and what looks like personal data."""
        yield from self._repeated(self._reported)
        for scan in self.table.scans:
            for digest, first in zip(scan.digests, scan.firsts, strict=True):
                for line, kind, masked in digest.flags:
                    problem = faults.PERSONAL_DATA(name=NAMES[kind], masked=masked)
                    yield Fault.at(scan.path, line + first, problem)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many rows were removed and how many warnings there are, by kind."""
        flags: Counter[str] = Counter()
        for scan in self.table.scans:
            for digest in scan.digests:
                flags.update(f"personal-data: {NAMES[kind]}" for _, kind, _ in digest.flags)
        warnings = {**_sizes(self._reported), **dict(sorted(flags.items()))}
        return {"removed": _sizes(self._removed), "warnings": warnings}

    def _repeated(self, lists: list[tuple[str, Pairs]]) -> Iterator[Fault]:
        for kind, pairs in lists:
            for row, other in zip(pairs.rows.tolist(), pairs.others.tolist(), strict=True):
                if kind == "near-duplicate" and self._held[row] and not self._held[other]:
                    kind = "near-leak"
                problem = _REPEATED[kind](first=self.table.named(other))
                yield Fault.at(*self.table.place(row), problem, int(self.table.number[row]))


_REPEATED = {
    wording.kind: wording
    for wording in (faults.DUPLICATE, faults.LEAK, faults.NEAR_DUPLICATE, faults.NEAR_LEAK)
}


def _sizes(lists: list[tuple[str, Pairs]]) -> dict[str, int]:
    return {kind: len(pairs.rows) for kind, pairs in lists if len(pairs.rows)}


def write_findings(
    path: Path, findings: Findings, skipped: Sequence[Fault] = (), cut: Sequence[Fault] = ()
) -> bool:
    """Write each removed, skipped or cut row and each warning, one line each; False for none."""
    count = 0
    # Streamed: a set of millions of rows can have as many findings.
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as stream:
        for fault in findings.removed():
            stream.write(f"removed: {fault.place}: {fault.what}\n")
            count += 1
        for done, faults in (("skipped", skipped), ("cut", cut)):
            stream.writelines(f"{done}: {fault.place}: {fault.what}\n" for fault in faults)
            count += len(faults)
        for fault in findings.warnings():
            stream.write(f"warning: {fault}\n")
            count += 1
    if count:
        temporary.replace(path)
    else:
        temporary.unlink()
        path.unlink(missing_ok=True)
    return count > 0


def sentences(counts: Mapping[str, Mapping[str, int]], report: str) -> list[str]:
    """The counts for people, one line per kind."""
    removed = [f"removed: {counted(n, 'row')} ({kind})" for kind, n in counts["removed"].items()]
    warned = [f"warning: {counted(n, 'row')} ({kind})" for kind, n in counts["warnings"].items()]
    return [f"{line}, listed in {report}" for line in (*removed, *warned)]


# How long conversations are in tokens: counted with a tokenizer, or estimated without one.

# Rows whose tokens are counted: a second of work, and the mean is then within some percent.
SAMPLE = 1000
_BYTES_PER_TOKEN = 4.0  # of English text with tokenizers of the usual size


def lengths(table: Table, rows: Ints, tokenizer: Path | None) -> TokenLengths | None:
    """Statistics over some rows; None when there are none.

    Raises UsageError where `tokenizer` is not a model folder.
    """
    if not len(rows):
        return None
    sizes = table.text_size[rows].astype(np.float64)
    if tokenizer is None:
        return _summary(sizes / _BYTES_PER_TOKEN, "estimated as one token per 4 bytes of text")
    try:
        chat = ChatFormat.from_folder(tokenizer)
    except ValueError as error:
        raise UsageError(str(error)) from None
    picked = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64))

    def tokens(row: int) -> float:
        try:
            turns = table.conversation(row).messages
            return len(chat.encode_example([turn.to_dict() for turn in turns]).input_ids)
        except ValueError:  # the model's template cannot write it; the audit says why
            return float(table.text_size[row]) / _BYTES_PER_TOKEN

    counted = np.array([tokens(row) for row in rows[picked].tolist()], np.float64)
    if len(picked) == len(rows):
        return _summary(counted, f"counted with the tokenizer of {tokenizer}")
    share = counted.sum() / max(sizes[picked].sum(), 1.0)
    how = f"estimated from {len(picked)} rows counted with the tokenizer of {tokenizer}"
    return _summary(sizes * share, how)


def _summary(tokens: npt.NDArray[np.float64], how: str) -> TokenLengths:
    median, high = np.percentile(tokens, [50, 95])
    return TokenLengths(
        rows=len(tokens),
        median=round(float(median)),
        mean=round(float(tokens.mean()), 1),
        p95=round(float(high)),
        longest=round(float(tokens.max())),
        total=round(float(tokens.sum())),
        how=how,
    )


# Rows that are refused, skipped or cut. What a tokenizer has to say comes from above: TokenRules.

# Every row of a set of this many is asked for; of a larger one those that may be too long, and a
# sample: what else the audit finds is the fault of a template, and then of nearly all rows.
EVERY_ROW = 20_000
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
        long = sum(kind == faults.TOO_LONG.kind for kind in rows.values())
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
            path = next(f.path for f in verdict.skipped if f.path in paths)
            verdict.faults.append(Fault.at(path, 0, faults.TOO_MANY_SKIPPED(reason=reason)))
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
                choice = data.too_long if problem.kind == faults.TOO_LONG.kind else data.bad_rows
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
