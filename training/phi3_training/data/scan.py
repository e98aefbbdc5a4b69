"""Reads sources to their ends, large JSON lines files with several processes, in flat memory.

The result does not depend on the number of processes. Block files go to the folder given.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from ..errors import StageError, counted
from ..progress import Progress, no_progress
from . import faults
from .conversation import Conversation
from .digest import BANDS, U32, U64, Batch, Bools, Ints, flags_of, keys_of, sketch
from .faults import Fault, Problem, place
from .jsonl import (
    CRLF,
    READ_BUFFER,
    SEPARATOR,
    CheckedRow,
    Range,
    StrictJson,
    check_line,
    check_row,
    join,
    lines_of,
    note_line_ends,
)
from .readers import BrokenFileError, Note
from .sources import Reading, Source, hash_of, place_of, stamp

BLOCK = 1 << 23  # bytes: the unit of work of one process
POOL_FROM = 48 << 20  # bytes; below, one process is done before others have started
MOST_WORKERS = 8  # each holds some 30 MB of its own


_BATCH = 1 << 20  # bytes of text whose words are found at once
_BATCH_ROWS = 1000  # short texts need a limit of their own


@dataclass
class Digest:
    """What is known of a block, in order. Lines count from the block's first, which is 1."""

    path: Path
    lines: int = 0
    faults: list[tuple[int, Problem, int]] = field(default_factory=list)  # line, what, row
    notes: Counter[str] = field(default_factory=Counter)  # what is unusual, and in how many lines
    filled: bool = False
    formats: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    decided: Counter[str] = field(default_factory=Counter)
    several_turns: int = 0
    flags: list[tuple[int, int, str]] = field(default_factory=list)
    # One entry per valid row. Where it is: in the source itself, or in the block file.
    line: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    number: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))  # of the row, else 0
    size: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    offset: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    in_source: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    identity: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    question: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    text_size: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    bands: U32 = field(default_factory=lambda: np.zeros((0, BANDS), np.uint32))


class Digester:
    """Takes sound rows one by one, writes those that are new, and fills a Digest."""

    def __init__(self, path: Path) -> None:
        self.digest = Digest(path)
        self.written = 0
        self._columns = array("Q")
        self._texts: list[bytes] = []
        self._systems: list[int] = []
        self._waiting = 0
        self._bands: list[U32] = []

    def take(
        self,
        line: int,
        row: CheckedRow | list[Problem],
        stream: BinaryIO,
        *,
        offset: int = 0,
        size: int = 0,
        number: int = 0,
    ) -> None:
        """Add a row, or what is wrong with it; `offset` and `size` are its place in the source."""
        digest = self.digest
        digest.filled = True
        if isinstance(row, list):
            digest.faults += [(line, problem, number) for problem in row]
            return
        text = row.joined
        identity, question, system = keys_of(text, row.texts[-2], row.has_system, row.unlearnt)
        in_source = row.written is None
        if row.written is not None:
            offset, size = self.written, len(row.written)
            self.written += stream.write(row.written)
        self._columns.extend((line, size, offset, in_source, identity, question, len(text), number))
        digest.formats[row.form] += 1
        if row.unused or row.notes:
            digest.unused.update(row.unused)
            digest.decided.update(row.notes)
        digest.several_turns += len(row.texts) > 3
        self._texts.append(text)
        self._systems.append(system)
        self._waiting += len(text)
        if self._waiting > _BATCH or len(self._texts) > _BATCH_ROWS:
            self._look_at_texts()

    def finish(self) -> Digest:
        """The digest of all rows taken."""
        self._look_at_texts()
        digest = self.digest
        columns = np.frombuffer(self._columns, np.uint64).reshape(-1, 8).T
        digest.line, digest.size, digest.text_size, digest.number = columns[[0, 1, 6, 7]].astype(
            np.uint32
        )
        digest.offset, digest.identity, digest.question = columns[[2, 4, 5]]
        digest.in_source = columns[3].astype(np.bool_)
        if self._bands:
            digest.bands = np.concatenate(self._bands)
        return digest

    def _look_at_texts(self) -> None:
        if not self._texts:
            return
        batch = Batch.of(self._texts, self._systems)
        first = len(self._columns) // 8 - len(self._texts)
        self._bands.append(sketch(batch))
        for row, kind, masked in flags_of(batch):
            self.digest.flags.append((self._columns[(first + row) * 8], kind, masked))
        self._texts, self._systems, self._waiting = [], [], 0


Task = tuple[Path, Range, Path]


def digest_range(source: Path, part: Range, path: Path) -> Digest:
    """Read the lines that start in a range of a JSON lines file; rewritten rows go to `path`."""
    digester, reader = Digester(path), StrictJson()
    with source.open("rb", buffering=READ_BUFFER) as stream, path.open("wb") as rows:
        for line in lines_of(stream, part):
            digester.digest.lines = line.number
            note_line_ends(line, digester.digest.notes)
            if not line.is_blank:
                checked = check_line(line, reader)
                digester.take(line.number, checked, rows, offset=line.offset, size=len(line.data))
    return digester.finish()


def digest_rows(reading: Reading, note: Note, folder: Path, name: str) -> Iterator[Digest]:
    """Read a source of another kind, in blocks; line numbers are the file's own."""
    line_ends: Counter[str] = Counter()
    rows = reading.rows(note, line_ends)
    number, more = 0, True
    while more:
        more = False
        digester = Digester(folder / f"{name}-{number:05}.jsonl")
        number += 1
        with digester.digest.path.open("wb") as stream:
            for row in rows:
                checked = check_row(row.value, row.problems)
                digester.take(row.line, checked, stream, number=row.row)
                if digester.written > BLOCK:
                    more = True
                    break
        if not more:
            digester.digest.notes += line_ends
        yield digester.finish()


@dataclass
class Scan:
    """All that is known of one source. `firsts[n]` is added to the line numbers of digest n."""

    source: Source
    part: str = "train"
    faults: list[Fault] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    several_turns: int = 0
    notes: list[str] = field(default_factory=list)
    size: int = 0
    sha256: str = ""
    changed_at: int = 0

    def has_changed(self) -> bool:
        """Whether a file is not as it was when it was opened."""
        return isinstance(self.source, Path) and _moment(self.source) != self.changed_at

    @property
    def path(self) -> Path:
        """The place that faults name."""
        return place_of(self.source)

    @property
    def rows(self) -> int:
        """How many sound rows there are."""
        return self.formats.total()

    def fault(self, line: int, problem: Problem, row: int = 0) -> None:
        """Note a problem."""
        self.faults.append(Fault.at(self.path, line, problem, row))

    def note(self, text: str) -> None:
        """Note what a person should know of the source."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, digests: Iterable[Digest]) -> None:
        """Put the blocks together as if they had been read in one go."""
        filled, first = False, 0
        seen: Counter[str] = Counter()
        decided: Counter[str] = Counter()
        for digest in digests:
            self.digests.append(digest)
            self.firsts.append(first)  # a block is read by a process that knows no line before it
            for line, problem, row in digest.faults:
                self.fault(line + first if line else 0, problem, row)
            seen += digest.notes
            filled |= digest.filled
            self.formats += digest.formats
            self.unused += digest.unused
            decided += digest.decided
            self.several_turns += digest.several_turns
            first += digest.lines
        for decision, many in sorted(decided.items()):
            self.note(f"{decision} ({counted(many, 'row')})")
        if self.unused:
            keys = [f"{key} ({counted(many, 'row')})" for key, many in sorted(self.unused.items())]
            self.note(f"keys that were not read: {', '.join(keys)}")
        for kind, many in seen.items():
            self.note(_NOTES[kind].format(lines=counted(many, "line")))
        if not filled:
            self.fault(0, faults.NO_ROWS() if self.size else faults.EMPTY_FILE())


_NOTES = {
    CRLF: "{lines} with Windows line ends (CRLF), read like others",
    SEPARATOR: "{lines} with U+2028, U+2029 or U+0085 in a text, which some editors take for the "
    "end of a line; kept as they are",
}


def scan(
    sources: Sequence[tuple[str, Source]],
    folder: Path,
    *,
    workers: int | None = None,
    block: int = BLOCK,
    progress: Progress = no_progress,
) -> list[Scan]:
    """Read all sources, each with the name of its part; `progress` counts the blocks."""
    scans = [Scan(source, part) for part, source in sources]
    tasks: list[tuple[Scan, list[Task]]] = []
    for number, scanned in enumerate(scans):
        with _faults_of_reading(scanned):
            reading = _opened(scanned)
            if reading.in_ranges:
                reading.encoding.report(scanned.note)
                tasks.append((scanned, _tasks(scanned.path, scanned.size, folder, number, block)))
            else:
                scanned.sha256 = stamp(scanned.source)
                scanned.add(digest_rows(reading, scanned.note, folder, str(number)))
    done, total = 0, sum(len(ranges) for _, ranges in tasks)

    def shown(scanned: Scan, digests: Iterable[Digest]) -> Iterator[Digest]:
        nonlocal done
        for digest in digests:
            yield digest
            done += 1
            progress(done, total, f"reading {scanned.path.name}")

    keep_freed_memory()
    if not workers:
        # Not all cores of the machine: a container or taskset may allow this process fewer.
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        large = sum(scanned.size for scanned, _ in tasks) >= POOL_FROM
        workers = max(1, min(cores, MOST_WORKERS)) if large else 1
    if workers == 1:
        for scanned, ranges in tasks:
            scanned.sha256 = hash_of(scanned.path)
            scanned.add(shown(scanned, (digest_range(*task) for task in ranges)))
        return scans
    # A fork is there at once and shares its memory; elsewhere it is not safe or not there.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
            futures = [[pool.submit(digest_range, *task) for task in ranges] for _, ranges in tasks]
            for (scanned, _), of_one in zip(tasks, futures, strict=True):
                scanned.sha256 = hash_of(scanned.path)  # while the workers read
                scanned.add(shown(scanned, (future.result() for future in of_one)))
    except BrokenProcessPool:
        raise StageError(
            "A process reading the chats was killed, most likely because memory ran out; close "
            "other programs and try again"
        ) from None
    return scans


def scan_start(source: Source, folder: Path, rows: int) -> Scan:
    """As much of a source as holds `rows` sound rows, in whole blocks."""

    def enough(digests: Iterable[Digest]) -> Iterator[Digest]:
        left = rows
        for digest in digests:
            yield digest
            left -= len(digest.line)
            if left <= 0:
                return

    scanned = Scan(source)
    with _faults_of_reading(scanned):
        reading = _opened(scanned)
        if reading.in_ranges:
            tasks = _tasks(scanned.path, scanned.size, folder, 0, BLOCK)
            digests: Iterable[Digest] = (digest_range(*task) for task in tasks)
        else:
            digests = digest_rows(reading, scanned.note, folder, "0")
        scanned.add(enough(digests))
    return scanned


@contextmanager
def _faults_of_reading(scanned: Scan) -> Iterator[None]:
    """A source that cannot be read is a fault of it."""
    try:
        yield
    except FileNotFoundError:
        scanned.fault(0, faults.NO_FILE())
    except BrokenFileError as error:
        scanned.fault(0, error.problem)
    except OSError as error:
        scanned.fault(0, faults.UNREADABLE(why=error.strerror))


def _opened(scanned: Scan) -> Reading:
    if isinstance(scanned.source, Path):
        scanned.size, scanned.changed_at = scanned.source.stat().st_size, _moment(scanned.source)
    return Reading.of(scanned.source)


def _moment(source: Source) -> int:
    return source.stat().st_mtime_ns if isinstance(source, Path) else 0


def _tasks(path: Path, size: int, folder: Path, number: int, block: int) -> list[Task]:
    return [
        (path, Range(start, min(start + block, size)), folder / f"{number}-{start // block}.jsonl")
        for start in range(0, size, block)
    ] or [(path, Range(0, 0), folder / f"{number}-0.jsonl")]


_KEPT = (32 << 20) - (64 << 10)  # just below the most that glibc's limits adapt to


def keep_freed_memory() -> None:
    """Let this process use freed memory again, which else goes back to the system each time.

    Allocating it again, page by page, took a third of the time of a scan. The C library of Linux
    keeps as much as the largest block that it saw freed; this one is never touched. Elsewhere
    nothing happens.
    """
    np.empty(_KEPT, np.uint8)


def _start_worker() -> None:
    gc.disable()  # no object here is part of a circle, and looking for some takes time
    keep_freed_memory()


# All sound rows of all sources as columns: 64 bytes a row, and each row's text on demand.

Column = TypeVar("Column", bound=np.generic)
_SPAN = 1 << 20  # bytes that are copied at once


class Span(NamedTuple):
    """Rows that lie near each other in one file."""

    rows: Ints
    path: Path
    start: int
    end: int
    places: list[int]  # of each row, counted from the start; a row's line end is not part of it
    sizes: list[int]


class Table:
    """The rows of scans, in order. `source` is the number of the scan that a row is of."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self.scans = scans
        digests = [digest for scanned in scans for digest in scanned.digests]
        firsts = [first for scanned in scans for first in scanned.firsts]
        self.line: U32 = _column(
            [d.line + np.uint32(f) for d, f in zip(digests, firsts, strict=True)], np.uint32
        )
        self.number: U32 = _column([d.number for d in digests], np.uint32)
        self.size: U32 = _column([d.size for d in digests], np.uint32)
        self.offset: U64 = _column([d.offset for d in digests], np.uint64)
        self.identity: U64 = _column([d.identity for d in digests], np.uint64)
        self.question: U64 = _column([d.question for d in digests], np.uint64)
        self.text_size: U32 = _column([d.text_size for d in digests], np.uint32)
        bands = [d.bands for d in digests if len(d.bands)]
        self.bands: U32 = np.concatenate(bands) if bands else np.zeros((0, BANDS), np.uint32)
        counts = [sum(len(d.line) for d in scanned.digests) for scanned in scans]
        self.source: U32 = np.repeat(np.arange(len(scans), dtype=np.uint32), counts)
        self._backing, self._paths = _backing(scans, digests)

    def __len__(self) -> int:
        return len(self.line)

    def in_part(self, *parts: str) -> Bools:
        """Which rows are of one of these parts."""
        chosen = np.array([scanned.part in parts for scanned in self.scans], np.bool_)
        return chosen[self.source] if len(self) else np.zeros(0, np.bool_)

    def place(self, row: int) -> tuple[Path, int]:
        """The source and line of a row."""
        return self.scans[int(self.source[row])].path, int(self.line[row])

    def named(self, row: int) -> str:
        """The place of a row as a person reads it."""
        return place(*self.place(row), int(self.number[row]))

    def conversation(self, row: int) -> Conversation:
        """A row, read back."""
        with self._paths[int(self._backing[row])].open("rb") as stream:
            stream.seek(int(self.offset[row]))
            value: dict[str, Any] = orjson.loads(stream.read(int(self.size[row])))
        return Conversation.from_dict(value, *self.place(row))

    def body(self, row: int) -> bytes:
        """The text of a row that is compared to find near-duplicates."""
        messages = self.conversation(row).messages
        texts = [message.content for message in messages]
        return join(texts[1:] if messages[0].role == "system" else texts)

    def spans(self, chosen: Ints) -> Iterator[Span]:
        """Rows (ascending) as stretches of some megabytes of one file."""
        backing = self._backing[chosen]
        # Rows of one file in ascending places, at most _SPAN bytes from the first to the last.
        for part in np.split(chosen, np.flatnonzero(np.diff(backing)) + 1):
            if not len(part):
                continue
            places = (self.offset[part] - self.offset[part[0]]) // np.uint64(_SPAN)
            for rows in np.split(part, np.flatnonzero(np.diff(places)) + 1):
                start = int(self.offset[rows[0]])
                end = int(self.offset[rows[-1]]) + int(self.size[rows[-1]])
                places = (self.offset[rows].astype(np.int64) - start).tolist()
                path = self._paths[int(self._backing[rows[0]])]
                yield Span(rows, path, start, end, places, self.size[rows].tolist())


def _column(parts: Sequence[npt.NDArray[Column]], kind: type[Column]) -> npt.NDArray[Column]:
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def _backing(scans: Sequence[Scan], digests: Sequence[Digest]) -> tuple[U32, list[Path]]:
    """For each row the number of the file that holds its bytes, and those files."""
    # A row that was written as it is read stays in its source; others are in their block's file.
    paths = [scanned.path for scanned in scans] + [digest.path for digest in digests]
    columns, number = [], len(scans)
    for index, scanned in enumerate(scans):
        for digest in scanned.digests:
            columns.append(np.where(digest.in_source, np.uint32(index), np.uint32(number)))
            number += 1
    return _column(columns, np.uint32), paths
