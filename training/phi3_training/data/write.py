"""Writes prepared conversations as JSON lines, counted and hashed on the way."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from .arrays import U8
from .table import Span, Table

_AHEAD = 2  # spans of 1 MB that are read before they are written


class RowWriter:
    """Rows for one file; when the `with` block ends they are on the disk, not only in a cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._stream = path.open("wb")
        self._hash = hashlib.sha256()
        self._hashed: Future[None] | None = None

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        self._await_hash()
        return self._hash.hexdigest()

    def write(self, data: bytes, rows: int, hashing: Executor) -> None:
        """Add whole lines; their hash is taken beside, as it takes as long as the writing.

        It stays one call behind at most, so that memory stays flat.
        """
        if rows:
            hashed = hashing.submit(self._hash.update, data)
            self._stream.write(data)
            self.rows += rows
            self._await_hash()
            self._hashed = hashed

    def _await_hash(self) -> None:
        if self._hashed is not None:
            self._hashed.result()


Lines = list[tuple[int, bytes, int]]  # number of the writer, lines, how many


def distribute(table: Table, target: U8, writers: Mapping[int, RowWriter]) -> None:
    """Copy each row to the writer that its number in `target` names; 0 is none.

    One thread reads and sorts ahead and one hashes while this one writes.
    """

    def sorted_lines(span: Span) -> Lines:
        texts, wanted = table.texts(span), target[span.rows]
        found = []
        for number in writers:
            chosen = [texts[place] for place in np.flatnonzero(wanted == number).tolist()]
            found.append((number, b"\n".join([*chosen, b""]), len(chosen)))
        return found

    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as hashing:
        waiting: deque[Future[Lines]] = deque()
        for span in table.spans(np.flatnonzero(target)):
            waiting.append(ahead.submit(sorted_lines, span))
            if len(waiting) > _AHEAD:
                _write(waiting.popleft().result(), writers, hashing)
        for last in waiting:
            _write(last.result(), writers, hashing)


def _write(lines: Lines, writers: Mapping[int, RowWriter], hashing: Executor) -> None:
    for number, data, rows in lines:
        writers[number].write(data, rows, hashing)
