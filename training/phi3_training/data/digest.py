"""What is known of a block of rows: its faults, and some numbers for each sound row.

Writes rows that must look otherwise than in their source to a block file: memory stays flat.
"""

from __future__ import annotations

import re
import string
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from .arrays import U8, U32, U64, Bools, Ints, mixed
from .faults import Problem
from .jsonl import CheckedRow

# The numbers that compare conversations: equal for the same messages, or for the same question.
# 64 bits each: of 40 million sets of a million rows, one has two different rows that fall together.

_QUESTION = 2


class Keys(NamedTuple):
    """`identity`: exactly these messages. `question`: the same last question in the same context.

    Case, spacing and closing marks of the question do not count: a model that was trained on
    "who wrote hamlet" has seen "Who wrote Hamlet?". `system` is the size of the system
    message in front.
    """

    identity: int
    question: int
    system: int


def keys_of(joined: bytes, question_text: str, has_system: bool, unlearnt: int = 0) -> Keys:
    """The keys of a checked conversation: its texts with a NUL between, and the last question.

    Its roles follow from `has_system`. Rows that teach different answers of the same conversation
    (`unlearnt`, see CheckedRow) are different rows.
    """
    answer = joined.rfind(b"\0")
    question = joined.rfind(b"\0", 0, answer) + 1
    asked = " ".join(question_text.casefold().split()).rstrip("?.! ").encode()
    return Keys(
        xxhash.xxh3_64_intdigest(joined, (has_system + 2 * unlearnt) % 2**64),
        xxhash.xxh3_64_intdigest(joined[:question] + asked, _QUESTION + has_system),
        joined.find(b"\0") + 1 if has_system else 0,
    )


# Near-duplicates: a short sketch of each text that similar ones share parts of, and the measure.
# A text is seen as its runs of 16 bytes that follow on certain letters, about 5 in 100 places. Two
# texts are near-duplicates if SIMILAR of the runs of both are in both (Jaccard), or, below SHORT
# runs (some 600 letters), if all their words are the same: one word may be the whole point there.

SIMILAR = 0.85
SHORT = 32
BANDS = 5
_PER_BAND = 4
_BINS = BANDS * _PER_BAND
_WANTED = 120  # runs that are looked at in a long text: six for each bin
_EMPTY = np.uint64(2**64 - 1)
# Runs follow on bytes with these low bits: h, H and (, and some bytes of every other script.
_ANCHOR_BITS, _ANCHOR = np.uint8(0x1F), np.uint8(0x08)
_NO_CASE = np.uint64(0x2020202020202020)
# 2^64 divided by the golden ratio, and xxHash's PRIME64_2: odd, with well mixed bits.
_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
_SPACES = b" " * 16  # as long as a run: none reaches into the next text
_WORDS = bytes(
    byte if byte >= 128 or chr(byte).isalnum() else 32 for byte in bytes(range(256)).lower()
)


class Batch(NamedTuple):
    """Texts that are looked at together; text n ends before `ends[n]` in `text`.

    Its first `systems[n]` bytes do not count for its likeness: else all rows with one system
    message would be alike.
    """

    texts: Sequence[bytes]
    text: bytes
    codes: U8
    ends: Ints
    systems: Ints

    @classmethod
    def of(cls, texts: Sequence[bytes], systems: Sequence[int] | None = None) -> Batch:
        """Put texts side by side, with enough spaces between them that no run reaches another."""
        text = _SPACES.join([b"", *texts, b""])
        ends = np.cumsum([len(_SPACES) + len(item) for item in texts])
        skipped = np.array(systems if systems is not None else [0] * len(texts), np.int64)
        return cls(texts, text, np.frombuffer(text, np.uint8), ends, skipped)

    def body(self, row: int) -> bytes:
        """A text without its system message."""
        return self.texts[row][self.systems[row] :]

    def row_of(self, places: Ints) -> Ints:
        """Which text each place of `text` is in."""
        return np.searchsorted(self.ends, places, side="right")


def sketch(batch: Batch) -> U32:
    """Five numbers for each text; similar texts have at least one in common.

    Of 85 % alike, 97 of 100 pairs are found, of 90 % alike 99 (one-permutation MinHash). 0 is
    none: a short text has one number only.
    """
    hashes, rows = _runs(batch)
    sizes = np.bincount(rows, minlength=len(batch.texts))
    least = _least_of_bins(hashes, rows, sizes).reshape(-1, BANDS, _PER_BAND)
    numbers = np.zeros((len(sizes), BANDS), np.uint64)
    for place in range(_PER_BAND):
        numbers = mixed(numbers + least[:, :, place])
    numbers = numbers >> np.uint64(32) | np.uint64(1)
    numbers[(least == _EMPTY).all(axis=2)] = 0
    for row in np.flatnonzero(sizes < SHORT).tolist():
        numbers[row] = 0
        words = words_of(batch.body(row))
        numbers[row, 0] = xxhash.xxh3_64_intdigest(words) >> 32 | 1 if words else 0
    return numbers.astype(np.uint32)


def _runs(batch: Batch) -> tuple[U64, Ints]:
    """The hashes of the runs of all texts, and which text each is of."""
    places = np.flatnonzero((batch.codes[: -len(_SPACES)] & _ANCHOR_BITS) == _ANCHOR)
    if batch.systems.any():
        rows = batch.row_of(places)
        sizes = np.diff(batch.ends, prepend=0) - len(_SPACES)
        places = places[places >= (batch.ends - sizes + batch.systems)[rows]]
    # Eight bytes from any place on: a view of the same memory that moves by one byte.
    eights = np.ndarray((len(batch.text) - 7,), "<u8", batch.text, strides=(1,))
    first, second = eights[places] | _NO_CASE, eights[places + 8] | _NO_CASE
    hashes = first * _ODD[0] + second * _ODD[1]
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _ODD[0]
    inside = np.searchsorted(places, batch.ends)  # runs up to the end of each text
    rows = np.repeat(np.arange(len(inside)), np.diff(inside, prepend=0))
    return hashes, rows


def _least_of_bins(hashes: U64, rows: Ints, sizes: Ints) -> U64:
    """The least hash of a text in each bin."""
    # Only the small hashes of long texts: the least of a bin is nearly always among them.
    share = np.minimum(_WANTED / np.maximum(sizes, 1), 1.0) * 2.0**32
    small = hashes >> np.uint64(32) < share.astype(np.uint64)[rows]
    hashes, rows = hashes[small], rows[small]
    bins = (hashes & np.uint64(0xFFFFFFFF)) * np.uint64(_BINS) >> np.uint64(32)
    least = np.full(len(sizes) * _BINS, _EMPTY)
    np.minimum.at(least, rows * _BINS + bins.astype(np.int64), hashes)
    return least


def words_of(text: bytes) -> bytes:
    """The words of a text in their order, without case, marks and spacing."""
    return b" ".join(text.translate(_WORDS).split())


class Measure:
    """The exact likeness of texts, for the few pairs that their sketches bring together."""

    def __init__(self, text: bytes) -> None:
        self._runs = np.unique(_runs(Batch.of([text]))[0])
        self._words = words_of(text) if len(self._runs) < SHORT else b""

    def near(self, other: Measure) -> bool:
        """Whether the two are near-duplicates."""
        if self._words or other._words:
            return self._words == other._words
        common = len(np.intersect1d(self._runs, other._runs, assume_unique=True))
        return common >= SIMILAR * (len(self._runs) + len(other._runs) - common)


# Flags what looks like personal data or a secret: e-mail, phone, key.
# Never gives the value, only how it looks with its letters and digits hidden.

EMAIL, PHONE, KEY = 1, 2, 4
NAMES = {EMAIL: "an e-mail address", PHONE: "a phone number", KEY: "a key or token"}

# Names under example.* and similar are reserved for examples (RFC 2606).
_EMAIL = re.compile(
    rb"[A-Za-z0-9._%+-]@(?!(?:[A-Za-z0-9-]+\.)*(?:example\.[a-z]+|example|invalid|test|localhost)\b)"
    rb"(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_PHONE = re.compile(
    rb"(?<![\w.+-])(?!\d\d?[./-]\d\d?[./-](?:19|20)?\d\d(?!\d))(?:"  # no date
    rb"\+\d[\d ().-]{6,18}\d"  # +49 30 1234567
    rb"|\(?0\d{1,4}\)?[ ./-]\d[\d ./-]{4,12}\d"  # (030) 123 45 67
    rb"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # 555-123-4567
    rb")(?![\w-]|\.\d)"
)
_KEY = re.compile(
    rb"(?<![A-Za-z0-9])(?:"
    rb"sk-[A-Za-z0-9_-]{20,}"
    rb"|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"
    rb"|gh[pousr]_[A-Za-z0-9]{30,}"
    rb"|hf_[A-Za-z0-9]{30,}"
    rb"|xox[abprs]-[A-Za-z0-9-]{20,}"
    rb"|AIza[A-Za-z0-9_-]{30,}"
    rb"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
    rb"|KEY-----[\r\n]"  # the head of a private key
    rb"|(?=[A-Za-z]*\d)(?=\d*[A-Za-z])(?=(?:[A-Za-z]*\d){4})(?=(?:\d*[A-Za-z]){4})"
    rb"[A-Za-z0-9+=]{32,}"
    rb")"
)
_NAME = b"._%+-" + string.ascii_letters.encode() + string.digits.encode()
_HIDE = re.compile(r"[^\W_]")
_SHOWN = 24
_PHONE_SPAN = 16  # bytes from the first to the seventh digit of a phone number
_FOUR_MARKS = np.uint32(0x01010101)


class Flag(NamedTuple):
    """That a text of the batch holds something of a kind, and how the first of them looks."""

    row: int
    kind: int
    masked: str


def masked(value: str) -> str:
    """A value with its letters and digits hidden, but the first and the last one."""
    hidden = value[0] + _HIDE.sub("*", value[1:-1]) + value[-1]
    return hidden if len(hidden) <= _SHOWN else hidden[: _SHOWN - 1] + "…"


def flags_of(batch: Batch) -> list[Flag]:
    """What the texts of a batch hold, each kind once per text.

    Patterns are tried only where one is possible: this looks at every byte of every text.
    """
    digits = np.flatnonzero(batch.codes - np.uint8(48) < 10)
    close = digits[6:] - digits[:-6] <= _PHONE_SPAN
    close[1:] &= ~(close[:-1] & (digits[1:-6] - digits[:-7] <= 3))
    return sorted(
        [
            *_matches(batch, _around(_places(batch.text, b"@"), 1, 96), _EMAIL, EMAIL),
            *_matches(batch, _around(digits[:-6][close].tolist(), 8, 48), _PHONE, PHONE),
            *_matches(batch, _unbroken(batch), _KEY, KEY),
        ]
    )


def _matches(
    batch: Batch, spans: Iterable[tuple[int, int]], pattern: re.Pattern[bytes], kind: int
) -> list[Flag]:
    """The texts in which the pattern matches in one of the spans, each once."""
    places, matches = [], []
    done = 0
    for start, end in spans:
        if match := pattern.search(batch.text, max(start, done), end):
            done = match.end()
            places.append(match.start() + 1)
            matches.append(match)
    rows = batch.row_of(np.array(places, np.int64)).tolist()
    first = dict(zip(reversed(rows), reversed(matches), strict=True))
    return [Flag(row, kind, masked(_value(batch, match))) for row, match in first.items()]


def _value(batch: Batch, match: re.Match[bytes]) -> str:
    """All of what was found: of an e-mail address the pattern takes one letter before the @."""
    start = match.start()
    if match.re is _EMAIL:
        before = batch.text[max(start - 64, 0) : start]
        start -= len(before) - len(before.rstrip(_NAME))
    return batch.text[start : match.end()].decode("utf-8", "replace").strip()


def _around(places: Iterable[int], before: int, after: int) -> Iterator[tuple[int, int]]:
    return ((max(place - before, 0), place + after) for place in places)


def _places(text: bytes, mark: bytes) -> Iterator[int]:
    place = text.find(mark)
    while place >= 0:
        yield place
        place = text.find(mark, place + 1)


def _unbroken(batch: Batch) -> Iterator[tuple[int, int]]:
    """The long runs without a space: each of 19 bytes or more has four of our groups of four."""
    marks = (batch.codes != ord(" "))[: len(batch.text) // 4 * 4]
    full = marks.view(np.uint32) == _FOUR_MARKS
    full = full[:-1] & full[1:]
    done = 0
    for group in np.flatnonzero(full[:-2] & full[2:]).tolist():
        if group * 4 < done:
            continue
        start = batch.text.rfind(b" ", 0, group * 4) + 1
        done = batch.text.find(b" ", group * 4 + 16)
        yield start, done


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
