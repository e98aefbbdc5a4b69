"""Reads lines of JSON quickly where nothing can be wrong with them; leaves all others alone.

Every line that is not accepted here is read by the strict reader, which alone names faults. What
is accepted is what the strict reader accepts, with the same values; the comments say why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import orjson

from .arrays import Ints
from .conversation import CARRIED, Message
from .formats import carried, read_row
from .lines import LINE_LIMIT, Chunk, doubtful_lines
from .rules import check_characters

_PLAIN_KEYS = {"messages", *CARRIED}
_OPEN, _CLOSE = b"{}"
# Python refuses integers of 4300 digits, or of fewer if told so, but never of fewer than 640.
_DIGITS = bytes(48 if 48 <= byte < 58 else 120 for byte in range(256))
_LONG_NUMBER = b"0" * 640


class Sound(NamedTuple):
    """A row without fault; `written` is None where the line itself will do."""

    form: str
    texts: list[str]
    has_system: bool
    joined: bytes
    written: bytes | None

    @classmethod
    def of(cls, form: str, messages: Sequence[Message], extra: Mapping[str, Any]) -> Sound:
        """A row that must be written anew."""
        texts = [message.content for message in messages]
        written = encode({"messages": [message.to_dict() for message in messages], **extra})
        return cls(form, texts, messages[0].role == "system", join(texts), written)


class _Plain(NamedTuple):
    """A row in the plainest form, with how many colons its keys, and what it carries, have."""

    sound: Sound
    more: list[str]
    colons: int


def accept(chunk: Chunk) -> list[Sound | None]:
    """The rows of lines, None where the strict reader must look.

    What can be looked for in all lines at once is looked for in all at once.
    """
    doubtful = doubtful_lines(chunk)
    found = [_read(line) for line in chunk.lines]
    plain = [row for row in found if isinstance(row, _Plain)]
    if len(plain) == len(found) and not doubtful and not _drops_a_key(chunk, plain):
        return [row.sound for row in plain]
    joined = [row.sound.joined if isinstance(row, _Plain) else b"" for row in found]
    surplus = _colons(chunk.text, chunk.ends)
    surplus -= _colons(b"\n".join([*joined, b""]), np.cumsum([len(text) + 1 for text in joined]))
    rows: list[Sound | None] = []
    for index, (row, colons) in enumerate(zip(found, surplus.tolist(), strict=True)):
        if isinstance(row, _Plain):
            hidden = index in doubtful and _hides(chunk.lines[index], (*row.sound.texts, *row.more))
            if colons == row.colons and not hidden:
                rows.append(row.sound)
                continue
            row = None if hidden else orjson.loads(chunk.lines[index])
        rows.append(_accept_other(row, chunk.lines[index]) if row is not None else None)
    return rows


def _drops_a_key(chunk: Chunk, plain: Sequence[_Plain]) -> bool:
    """Whether orjson dropped a key of some line.

    Each key of a line has a colon, and so has nothing else but texts. A key that is there twice
    was dropped by orjson, with its colon: then there is one more in the line.
    """
    texts = b"".join([row.sound.joined for row in plain])
    surplus = _count(chunk.text[: int(chunk.ends[-1])]) - _count(texts)
    return surplus != sum([row.colons for row in plain])


def _count(text: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord(":")))


def _colons(text: bytes, ends: Ints) -> Ints:
    """How many colons each part of a text has."""
    places = np.flatnonzero(np.frombuffer(text, np.uint8) == ord(":"))
    return np.diff(np.searchsorted(places, ends), prepend=0)


def _read(line: bytes) -> _Plain | dict[str, Any] | None:
    """A line as a plain row, as an object of any other form, or neither."""
    if len(line) > LINE_LIMIT or line.endswith(b"\r"):
        return None
    try:
        row = orjson.loads(line)  # refuses NaN, lone surrogates, bad UTF-8 and raw controls
    except orjson.JSONDecodeError:
        return None
    if type(row) is not dict:
        return None
    plain = _plain_messages(row.get("messages"))
    if plain is None or not row.keys() <= _PLAIN_KEYS:
        return row
    texts, joined = plain
    more = [row[key] for key in CARRIED if key in row]
    try:
        colons = len(row) + 2 * len(texts) + "".join(more).count(":")
    except TypeError:  # not only texts
        return row
    whole = line[0] == _OPEN and line[-1] == _CLOSE
    written = None if whole else line.strip()
    return _Plain(Sound("messages", texts, len(texts) % 2 == 1, joined, written), more, colons)


def join(texts: Sequence[str]) -> bytes:
    """All texts of a conversation; no checked text holds a NUL, so different ones stay apart."""
    return "\0".join(texts).encode()


def _plain_messages(messages: Any) -> tuple[list[str], bytes] | None:
    """The texts of messages in their plainest form: two keys each, texts not blank, in order.

    Without a loop of our own: this runs for every message of every row.
    """
    if type(messages) is not list:
        return None
    try:
        texts = [message["content"] for message in messages]
        joined = join(texts)
        roles = [message["role"] for message in messages]
    except (KeyError, TypeError, IndexError):  # something is no object, or no text
        return None
    count = len(roles)
    if sum(map(len, messages)) != 2 * count or count < 2 or roles != _roles(count):
        return None
    return None if "" in texts or any(map(str.isspace, texts)) else (texts, joined)


@lru_cache(256)
def _roles(count: int) -> list[str]:
    """The roles of so many messages: an odd number has a system message."""
    turns = ["user", "assistant"] * (count // 2)
    return ["system", *turns] if count % 2 else turns


def _accept_other(row: dict[str, Any], line: bytes) -> Sound | None:
    """A row in another format or with more keys, through the general rules."""
    form, messages, problems = read_row(row)
    if problems or form is None or _hides_colon(line) or b"\x7f" in line:
        return None
    extra, problems = carried(row)
    if problems or (len(line) > len(_LONG_NUMBER) and _LONG_NUMBER in line.translate(_DIGITS)):
        return None
    try:
        whole = orjson.dumps(row)  # refuses what is nested more deeply than 254
    except orjson.JSONEncodeError:
        return None
    if whole.count(b":") != line.count(b":"):
        return None
    return Sound.of(form, messages, extra)


def _hides(line: bytes, texts: Sequence[str]) -> bool:
    return _hides_colon(line) or any(check_characters("", text) for text in texts)


def _hides_colon(line: bytes) -> bool:
    return b"\\u003" in line and b"\\u003a" in line.lower()


def encode(value: Any) -> bytes:
    """Any JSON value in its shortest form, in UTF-8."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
