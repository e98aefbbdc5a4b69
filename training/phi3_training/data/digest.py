"""What is computed of each text: numbers that compare conversations, and signs of personal data.

Works on whole batches of texts with numpy; reads and writes nothing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# The multipliers of splitmix64 (https://prng.di.unimi.it/splitmix64.c).
_SPLITMIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mixed(values: U64) -> U64:
    """Numbers of which every bit depends on every bit of the given ones (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * _SPLITMIX[0]
    values = (values ^ (values >> np.uint64(27))) * _SPLITMIX[1]
    return values ^ (values >> np.uint64(31))


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
    # The least hash of each text in each bin. Only the small hashes of long texts are sorted into
    # bins: the least of a bin is nearly always among them.
    share = np.minimum(_WANTED / np.maximum(sizes, 1), 1.0) * 2.0**32
    small = hashes >> np.uint64(32) < share.astype(np.uint64)[rows]
    hashes, rows = hashes[small], rows[small]
    bins = (hashes & np.uint64(0xFFFFFFFF)) * np.uint64(_BINS) >> np.uint64(32)
    lowest = np.full(len(sizes) * _BINS, _EMPTY)
    np.minimum.at(lowest, rows * _BINS + bins.astype(np.int64), hashes)
    least = lowest.reshape(-1, BANDS, _PER_BAND)
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

    def long_runs() -> Iterator[tuple[int, int]]:
        """Runs without a space: each of 19 bytes or more has four of our groups of four."""
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

    digits = np.flatnonzero(batch.codes - np.uint8(48) < 10)
    close = digits[6:] - digits[:-6] <= _PHONE_SPAN
    close[1:] &= ~(close[:-1] & (digits[1:-6] - digits[:-7] <= 3))
    return sorted(
        [
            *_matches(
                batch,
                _around((at.start() for at in re.finditer(b"@", batch.text)), 1, 96),
                _EMAIL,
                EMAIL,
            ),
            *_matches(batch, _around(digits[:-6][close].tolist(), 8, 48), _PHONE, PHONE),
            *_matches(batch, long_runs(), _KEY, KEY),
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
    flags = []
    for row, match in first.items():
        start = match.start()
        if kind == EMAIL:  # its pattern takes one letter before the @: searching is then fast
            before = batch.text[max(start - 64, 0) : start]
            start -= len(before) - len(before.rstrip(_NAME))
        value = batch.text[start : match.end()].decode("utf-8", "replace").strip()
        flags.append(Flag(row, kind, masked(value)))
    return flags


def _around(places: Iterable[int], before: int, after: int) -> Iterator[tuple[int, int]]:
    return ((max(place - before, 0), place + after) for place in places)
