"""What becomes of repeated rows, and what else is worth a warning. Reads scans and their Table.

Faults stop the run, removed rows are left out and listed, warnings are only reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, counted
from ..manifests import TokenLengths
from ..prompt import ChatFormat
from ..recipe import HubSet
from .arrays import U64, Bools, Ints
from .digest import BANDS, NAMES, Measure
from .faults import Fault, Problem, in_order
from .scan import Scan, Table

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
    asked = _trained_question(table, held)
    leaking = (asked >= 0) & ~repeated
    wanted = ~repeated & ~leaking
    candidates = _candidates(table, wanted)
    measure = lru_cache(_MEASURED)(lambda row: Measure(table.body(row)))
    like: dict[int, int] = {}
    for row in sorted(candidates):
        earlier = {like.get(other, other) for other in candidates[row]}
        for other in sorted(earlier):
            if measure(row).near(measure(other)) and not _teach_apart(table, row, other):
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


def _trained_question(table: Table, held: Bools) -> Ints:
    """For each held-out row a trained row with its question, or -1."""
    asked = np.full(len(table), -1, np.int64)
    if not held.any():
        return asked
    trained, asking = np.flatnonzero(~held), np.flatnonzero(held)
    order = np.argsort(table.question[trained], kind="stable")
    questions = table.question[trained][order]
    place = np.searchsorted(questions, table.question[asking])
    inside = place < len(questions)
    same = np.zeros(len(asking), np.bool_)
    same[inside] = questions[place[inside]] == table.question[asking][inside]
    asked[asking[same]] = trained[order[place[same]]]
    return asked


def _teach_apart(table: Table, row: int, other: int) -> bool:
    """Whether two rows are one conversation of which they teach different answers."""
    first, second = table.conversation(row).messages, table.conversation(other).messages
    return first != second and [m.content for m in first] == [m.content for m in second]


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
                    what = f"it seems to contain {NAMES[kind]} ({masked})"
                    fix = "remove it, or replace it with a made-up one"
                    problem = Problem("personal-data", what, fix)
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
                problem = self._problem(kind, row, other)
                yield Fault.at(*self.table.place(row), problem, int(self.table.number[row]))

    def _problem(self, kind: str, row: int, other: int) -> Problem:
        first = self.table.named(other)
        if kind == "duplicate":
            fix = "keep one of the two, or set data.duplicates=remove"
            return Problem(kind, f"the same conversation as {first}", fix)
        if kind == "leak":
            what = f"held out, but {first} trains on the same question in the same context"
            fix = "remove it from one of the two sets: a score on trained questions means nothing"
            return Problem(kind, what, fix)
        if self._held[row] and not self._held[other]:
            what = f"held out, but nearly the same as {first}, which is trained on"
            return Problem("near-leak", what, "remove it from one of the two sets")
        what = f"nearly the same conversation as {first}"
        return Problem(kind, what, "keep one of the two, or set data.near_duplicates=remove")


def _sizes(lists: list[tuple[str, Pairs]]) -> dict[str, int]:
    return {kind: len(pairs.rows) for kind, pairs in lists if len(pairs.rows)}


def write_findings(
    path: Path, findings: Findings, skipped: Sequence[Fault] = (), cut: Sequence[Fault] = ()
) -> bool:
    """Write each removed, skipped or cut row and each warning, one line each; False for none."""
    count = 0
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
    counted = np.array([_tokens(table, int(row), chat) for row in rows[picked]], np.float64)
    if len(picked) == len(rows):
        return _summary(counted, f"counted with the tokenizer of {tokenizer}")
    share = counted.sum() / max(sizes[picked].sum(), 1.0)
    how = f"estimated from {len(picked)} rows counted with the tokenizer of {tokenizer}"
    return _summary(sizes * share, how)


def _tokens(table: Table, row: int, chat: ChatFormat) -> float:
    """Tokens of a row; estimated where the model's template cannot write it."""
    try:
        turns = table.conversation(row).messages
        return len(chat.encode_example([turn.to_dict() for turn in turns]).input_ids)
    except ValueError:
        return float(table.text_size[row]) / _BYTES_PER_TOKEN


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
