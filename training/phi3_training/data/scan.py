"""Reads sources to their ends, large JSON lines files with several processes, in flat memory.

The result does not depend on the number of processes. Block files go to the folder given.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import StageError
from .arrays import keep_freed_memory
from .blocks import BLOCK, digest_range, digest_rows
from .digest import Digest, Lines
from .faults import Fault, Problem
from .lines import Range, blank, crlf
from .sources import Source, hash_of, is_lines, place_of, rows_of, stamp

POOL_FROM = 48 << 20  # bytes; below, one process is done before others have started
MOST_WORKERS = 8  # each holds some 30 MB of its own


Task = tuple[Path, Range, Path]


@dataclass
class Scan:
    """All that is known of one source. `firsts[n]` is added to the line numbers of digest n."""

    source: Source
    part: str = "train"
    faults: list[Fault] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    several_turns: int = 0
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

    def fault(self, line: int, problem: Problem) -> None:
        """Note a problem."""
        self.faults.append(Fault.at(self.path, line, problem))

    def add(self, digests: Iterable[Digest]) -> None:
        """Put the blocks together as if they had been read in one go."""
        ends, blanks, filled, first = Lines(0, 0), [], False, 0
        for digest in digests:
            self.digests.append(digest)
            self.firsts.append(first)
            for line, problem in digest.faults:
                self.fault(line + first if line else 0, problem)
            if digest.stop:
                return
            if digest.crlf.many:
                ends = Lines(ends.first or digest.crlf.first + first, ends.many + digest.crlf.many)
            blanks += [Lines(run.first + first, run.many) for run in digest.blanks]
            filled |= digest.filled
            self.formats += digest.formats
            self.several_turns += digest.several_turns
            first += digest.lines
        if ends.many:
            self.fault(ends.first, crlf(ends.many))
        for run in _joined(blanks):
            if run.behind <= first:  # blank lines at the end of a file are fine
                self.fault(run.first, blank(run.many))
        if not filled:
            what = "the file holds no conversation" if self.size else "the file is empty"
            self.fault(0, Problem("no-rows", what, "write one conversation per line"))


def _joined(runs: Iterable[Lines]) -> list[Lines]:
    """Runs that touch, at the border of two blocks, as one."""
    joined: list[Lines] = []
    for run in runs:
        if joined and joined[-1].behind == run.first:
            joined[-1] = Lines(joined[-1].first, joined[-1].many + run.many)
        else:
            joined.append(run)
    return joined


def scan(
    sources: Sequence[tuple[str, Source]],
    folder: Path,
    *,
    workers: int | None = None,
    block: int = BLOCK,
) -> list[Scan]:
    """Read all sources, each with the name of its part."""
    scans = [Scan(source, part) for part, source in sources]
    tasks: list[tuple[Scan, list[Task]]] = []
    for number, one in enumerate(scans):
        with _told(one):
            _stamp(one)
            if isinstance(one.source, Path) and is_lines(one.source):
                tasks.append((one, _tasks(one.source, one.size, folder, number, block)))
            else:
                one.add(digest_rows(rows_of(one.source), folder, str(number)))
    _read(tasks, workers or _workers(sum(one.size for one, _ in tasks)))
    return scans


def scan_start(source: Source, folder: Path, rows: int) -> Scan:
    """As much of a source as holds `rows` sound rows, in whole blocks."""
    one = Scan(source)
    with _told(one):
        _stamp(one)
        digests: Iterable[Digest] = digest_rows(rows_of(source), folder, "0")
        if isinstance(source, Path) and is_lines(source):
            tasks = _tasks(source, one.size, folder, 0, BLOCK)
            digests = (digest_range(*task) for task in tasks)
        one.add(_until(digests, rows))
    return one


def _until(digests: Iterable[Digest], rows: int) -> Iterator[Digest]:
    for digest in digests:
        yield digest
        rows -= len(digest.line)
        if rows <= 0:
            return


@contextmanager
def _told(one: Scan) -> Iterator[None]:
    """A source that cannot be read is a fault of it."""
    try:
        yield
    except FileNotFoundError:
        one.fault(0, Problem("no-such-file", "no such file", "check its path and spelling"))
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        one.fault(0, Problem("unreadable", what, "name a file that you may read"))


def _stamp(one: Scan) -> None:
    one.size, one.sha256 = stamp(one.source)
    one.changed_at = _moment(one.source)


def _moment(source: Source) -> int:
    return source.stat().st_mtime_ns if isinstance(source, Path) else 0


def _tasks(path: Path, size: int, folder: Path, number: int, block: int) -> list[Task]:
    return [
        (path, Range(start, min(start + block, size)), folder / f"{number}-{start // block}.jsonl")
        for start in range(0, size, block)
    ] or [(path, Range(0, 0), folder / f"{number}-0.jsonl")]


def _workers(size: int) -> int:
    if size < POOL_FROM:
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, MOST_WORKERS))


def _read(tasks: Sequence[tuple[Scan, list[Task]]], workers: int) -> None:
    keep_freed_memory()
    if workers == 1:
        for one, ranges in tasks:
            one.sha256 = hash_of(one.path)
            one.add(digest_range(*task) for task in ranges)
        return
    # A fork is there at once and shares its memory; elsewhere it is not safe or not there.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
            futures = [[pool.submit(digest_range, *task) for task in ranges] for _, ranges in tasks]
            for (one, _), of_one in zip(tasks, futures, strict=True):
                one.sha256 = hash_of(one.path)
                one.add(_results(of_one))
    except BrokenProcessPool:
        raise StageError(
            "A process that read the chats was ended from outside, most likely for want of "
            "memory; close other programs and try again"
        ) from None


def _start_worker() -> None:
    gc.disable()
    keep_freed_memory()


def _results(futures: list[Future[Digest]]) -> Iterator[Digest]:
    for future in futures:
        yield future.result()
