"""All sound rows of all sources as columns: 60 bytes a row, and each row's text on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import orjson

from .arrays import U32, U64, Bools, Ints
from .conversation import Conversation
from .digest import Digest
from .fast_json import join
from .scan import Scan
from .sketch import BANDS

Column = TypeVar("Column", bound=np.generic)
_SPAN = 1 << 20  # bytes that are copied at once


class Span(NamedTuple):
    """Rows that lie near each other in one file."""

    rows: Ints
    path: Path
    start: int
    end: int


class Table:
    """The rows of scans, in order. `source` is the number of the scan that a row is of."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self.scans = scans
        digests = [digest for one in scans for digest in one.digests]
        firsts = [first for one in scans for first in one.firsts]
        self.line: U32 = _column(
            [d.line + np.uint32(f) for d, f in zip(digests, firsts, strict=True)], np.uint32
        )
        self.size: U32 = _column([d.size for d in digests], np.uint32)
        self.offset: U64 = _column([d.offset for d in digests], np.uint64)
        self.identity: U64 = _column([d.identity for d in digests], np.uint64)
        self.question: U64 = _column([d.question for d in digests], np.uint64)
        self.text_size: U32 = _column([d.text_size for d in digests], np.uint32)
        bands = [d.bands for d in digests if len(d.bands)]
        self.bands: U32 = np.concatenate(bands) if bands else np.zeros((0, BANDS), np.uint32)
        counts = [sum(len(d.line) for d in one.digests) for one in scans]
        self.source: U32 = np.repeat(np.arange(len(scans), dtype=np.uint32), counts)
        self._backing, self._paths = _backing(scans, digests)

    def __len__(self) -> int:
        return len(self.line)

    def in_part(self, *parts: str) -> Bools:
        """Which rows are of one of these parts."""
        chosen = np.array([one.part in parts for one in self.scans], np.bool_)
        return chosen[self.source] if len(self) else np.zeros(0, np.bool_)

    def place(self, row: int) -> tuple[Path, int]:
        """The source and line of a row."""
        return self.scans[int(self.source[row])].path, int(self.line[row])

    def conversation(self, row: int) -> Conversation:
        """A row, read back."""
        with self._paths[int(self._backing[row])].open("rb") as stream:
            stream.seek(int(self.offset[row]))
            value: dict[str, Any] = orjson.loads(stream.read(int(self.size[row])))
        return Conversation.from_dict(value, *self.place(row))

    def body(self, row: int) -> bytes:
        """The text of a row that near-duplicates are told by."""
        messages = self.conversation(row).messages
        texts = [message.content for message in messages]
        return join(texts[1:] if messages[0].role == "system" else texts)

    def spans(self, chosen: Ints) -> Iterator[Span]:
        """Rows (ascending) as stretches of some megabytes of one file."""
        for rows in _stretches(self, chosen):
            start = int(self.offset[rows[0]])
            end = int(self.offset[rows[-1]]) + int(self.size[rows[-1]])
            yield Span(rows, self._paths[int(self._backing[rows[0]])], start, end)

    def texts(self, span: Span) -> list[memoryview]:
        """The bytes of the rows of a span, without line ends."""
        with span.path.open("rb") as stream:
            stream.seek(span.start)
            data = memoryview(stream.read(span.end - span.start))
        places = (self.offset[span.rows].astype(np.int64) - span.start).tolist()
        sizes = self.size[span.rows].tolist()
        return [data[a : a + n] for a, n in zip(places, sizes, strict=True)]


def _column(parts: Sequence[npt.NDArray[Column]], kind: type[Column]) -> npt.NDArray[Column]:
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def _backing(scans: Sequence[Scan], digests: Sequence[Digest]) -> tuple[U32, list[Path]]:
    """For each row the number of the file that holds its bytes, and those files."""
    paths = [one.path for one in scans] + [digest.path for digest in digests]
    columns, number = [], len(scans)
    for index, one in enumerate(scans):
        for digest in one.digests:
            columns.append(np.where(digest.in_source, np.uint32(index), np.uint32(number)))
            number += 1
    return _column(columns, np.uint32), paths


def _stretches(table: Table, chosen: Ints) -> Iterator[Ints]:
    """Rows of one file in ascending places, at most _SPAN bytes from the first to the last."""
    backing = table._backing[chosen]
    for part in np.split(chosen, np.flatnonzero(np.diff(backing)) + 1):
        if len(part):
            places = (table.offset[part] - table.offset[part[0]]) // np.uint64(_SPAN)
            yield from np.split(part, np.flatnonzero(np.diff(places)) + 1)
