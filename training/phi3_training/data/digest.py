"""What is known of a block of rows: its faults, and some numbers for each sound row.

Writes rows that must look otherwise than in their source to a block file: memory stays flat.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from .arrays import U32, U64, Bools
from .fast_json import Sound
from .faults import Problem
from .keys import keys_of
from .personal import flags_of
from .sketch import BANDS, Batch, sketch

_BATCH = 1 << 20  # bytes of text whose words are found at once
_BATCH_ROWS = 1000


class Lines(NamedTuple):
    """Lines that share one fault: the first of them, and how many follow on each other."""

    first: int
    many: int

    @property
    def behind(self) -> int:
        """The line behind them."""
        return self.first + self.many


@dataclass
class Digest:
    """What is known of a block, in order. Lines count from the block's first, which is 1."""

    path: Path
    lines: int = 0
    faults: list[tuple[int, Problem]] = field(default_factory=list)
    blanks: list[Lines] = field(default_factory=list)
    crlf: Lines = field(default_factory=lambda: Lines(0, 0))
    filled: bool = False
    stop: bool = False  # the file is not what it seems: nothing else in it counts
    formats: Counter[str] = field(default_factory=Counter)
    several_turns: int = 0
    flags: list[tuple[int, int, str]] = field(default_factory=list)
    # One entry for each sound row. Where it lies: in the source itself, or in the block file.
    line: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    size: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    offset: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    in_source: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    identity: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    question: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    text_size: U32 = field(default_factory=lambda: np.zeros(0, np.uint32))
    bands: U32 = field(default_factory=lambda: np.zeros((0, BANDS), np.uint32))

    def add_crlf(self, line: int) -> None:
        """Note a line with a Windows line end."""
        self.crlf = Lines(self.crlf.first or line, self.crlf.many + 1)

    def add_blank(self, line: int) -> None:
        """Note a blank line; those that follow on each other are one entry."""
        if self.blanks and self.blanks[-1].behind == line:
            self.blanks[-1] = self.blanks[-1]._replace(many=self.blanks[-1].many + 1)
        else:
            self.blanks.append(Lines(line, 1))

    def fault(self, line: int, problem: Problem) -> None:
        """Note a problem of a line."""
        self.faults.append((line, problem))


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

    def take(self, line: int, sound: Sound, offset: int, size: int, stream: BinaryIO) -> None:
        """Add a sound row; `offset` and `size` are its place in the source."""
        digest = self.digest
        text = sound.joined
        identity, question, system = keys_of(text, sound.texts[-2], sound.has_system)
        if sound.written is not None:
            offset, size = self.written, len(sound.written)
            self.written += stream.write(sound.written)
        in_source = sound.written is None
        self._columns.extend((line, size, offset, in_source, identity, question, len(text)))
        digest.filled = True
        digest.formats[sound.form] += 1
        digest.several_turns += len(sound.texts) > 3
        self._texts.append(text)
        self._systems.append(system)
        self._waiting += len(text)
        if self._waiting > _BATCH or len(self._texts) > _BATCH_ROWS:
            self._look_at_texts()

    def finish(self) -> Digest:
        """The digest of all rows taken."""
        self._look_at_texts()
        digest = self.digest
        columns = np.frombuffer(self._columns, np.uint64).reshape(-1, 7).T
        digest.line, digest.size, digest.text_size = columns[[0, 1, 6]].astype(np.uint32)
        digest.offset, digest.identity, digest.question = columns[[2, 4, 5]]
        digest.in_source = columns[3].astype(np.bool_)
        if self._bands:
            digest.bands = np.concatenate(self._bands)
        return digest

    def _look_at_texts(self) -> None:
        if not self._texts:
            return
        batch = Batch.of(self._texts, self._systems)
        first = len(self._columns) // 7 - len(self._texts)
        self._bands.append(sketch(batch))
        for row, kind, masked in flags_of(batch):
            self.digest.flags.append((self._columns[(first + row) * 7], kind, masked))
        self._texts, self._systems, self._waiting = [], [], 0
