"""Flags what looks like personal data or a secret: e-mail, phone, key.

Never gives the value, only how it looks with its letters and digits hidden.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from .arrays import U8, Ints
from .sketch import Batch

EMAIL, PHONE, KEY = 1, 2, 4
NAMES = {EMAIL: "an e-mail address", PHONE: "a phone number", KEY: "a key or token"}

# Names under example.* and the like are made for examples (RFC 2606).
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
_PHONE_SPAN = 16
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
    return sorted(
        [
            *_matches(batch, _around(_places(batch.text, b"@"), 1, 96), _EMAIL, EMAIL),
            *_matches(batch, _around(_digit_places(batch.codes).tolist(), 8, 48), _PHONE, PHONE),
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


def _digit_places(text: U8) -> Ints:
    """Where seven digits begin that stand close enough for a phone number, first of a cluster."""
    digits = np.flatnonzero(text - np.uint8(48) < 10)
    close = digits[6:] - digits[:-6] <= _PHONE_SPAN
    close[1:] &= ~(close[:-1] & (digits[1:-6] - digits[:-7] <= 3))
    return digits[:-6][close]


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
