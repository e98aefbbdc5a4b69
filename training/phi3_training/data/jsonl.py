"""Lines of JSON: split from a file, read strictly, and turned into checked rows.

Repeated keys, NaN and Infinity are faults here, not values: most JSON libraries drop the one
silently and accept the other. Rows in the plainest form take one pass of orjson.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import orjson

from . import faults
from .conversation import CARRIED, has_c1_controls, has_unfit_characters
from .faults import Problem
from .formats import Row, carried, read_row

# The longest line that is read. A conversation of 1 MiB has some 250,000 tokens, twice the
# context of the longest Phi-3; without a limit a file without line ends fills the memory.
LINE_LIMIT = 1 << 20
READ_BUFFER = 1 << 18  # bytes; Python's default of 8 KiB reads a chat in several pieces
_CHUNK = 1 << 16  # of a line that is only counted
_NEAR = 24  # characters around a fault that its message shows
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Range(NamedTuple):
    """Bytes of a file. The lines that start in it are its own, also where they end beyond it."""

    start: int
    end: int


class Line(NamedTuple):
    """One line without its LF. A line beyond the limit has its true size and no data."""

    number: int
    offset: int
    data: bytes
    size: int

    @property
    def is_too_long(self) -> bool:
        """Whether the line was beyond the limit, so that its data was dropped."""
        return self.size > LINE_LIMIT

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing on the line but spaces."""
        return not self.is_too_long and not self.data.strip()


def lines_of(stream: BinaryIO, part: Range) -> Iterator[Line]:
    """The lines of a range, counted from 1; memory holds one of them, of limited size.

    Seeks once, unless the range starts at 0.
    """
    offset = part.start
    if offset:
        # The line that starts before the range belongs to the range before. Reading stops at
        # the end of the range: else a file without line ends is read once for each range.
        offset -= 1
        stream.seek(offset)
        while offset < part.end and (data := stream.readline(_CHUNK)):
            offset += len(data)
            if data.endswith(b"\n"):
                break
    number = 0
    while offset < part.end and (data := stream.readline(LINE_LIMIT + 1)):
        number += 1
        size = len(data)
        if size > LINE_LIMIT and not data.endswith(b"\n"):
            ended = False
            while not ended and (rest := stream.readline(_CHUNK)):
                size += len(rest)
                ended = rest.endswith(b"\n")
            yield Line(number, offset, b"", size - ended)
        else:
            text = data.removesuffix(b"\n")
            yield Line(number, offset, text, len(text))
        offset += size


# Line ends that a person should know of.
CRLF, SEPARATOR = "crlf", "separator"
# U+2028, U+2029 and NEL, which JSON allows in texts.
_SEPARATORS = (b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85")


def note_line_ends(line: Line, notes: Counter[str]) -> None:
    """Count line ends of Windows, and what other programs take for line ends inside of texts."""
    if line.data.endswith(b"\r"):
        notes[CRLF] += 1
    if not line.data.isascii() and any(mark in line.data for mark in _SEPARATORS):
        notes[SEPARATOR] += 1


class StrictJson:
    """A decoder for many values; each read gives the value and all its problems."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            # NaN, Infinity and -Infinity: Python reads them, RFC 8259 has no such values.
            parse_constant=lambda name: self._problems.append(faults.NOT_A_NUMBER(name=name)),
        )

    def read(self, text: str) -> tuple[object, list[Problem]]:
        """The value of a text; it is None when the text is not JSON."""
        value, problems, _ = self._read(text, lambda: (self._decoder.decode(text), len(text)))
        return value, problems

    def read_at(self, text: str, place: int) -> tuple[object, list[Problem], int | None]:
        """The value that starts at a place, and where it ends; None if it is incomplete."""
        return self._read(text, lambda: self._decoder.raw_decode(text, place))

    def read_line(self, line: Line) -> tuple[object, list[Problem]]:
        """The value of a line of a file; None where the line is not UTF-8 or not JSON."""
        if line.is_too_long:
            size = line.size / 1e6
            return None, [faults.LINE_TOO_LONG(size=size, limit=LINE_LIMIT >> 20)]
        data = line.data.removeprefix(codecs.BOM_UTF8) if line.offset == 0 else line.data
        try:
            value, problems = self.read(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            at = error.start + 1
            problem = faults.LINE_NOT_UTF8(byte=data[error.start], at=at, in_file=line.offset + at)
            value, problems = None, [problem]
        # JSON allows no raw control byte but DEL, so that the others are why a line is broken.
        is_suspect = (value is None and problems) or b"\x7f" in data
        if is_suspect and (control := _CONTROL.search(data)):
            byte, at = control.group()[0], control.start() + 1
            name = "a NUL byte" if byte == 0 else f"the control byte 0x{byte:02x}"
            return None, [faults.CONTROL_BYTE(name=name, at=at, in_file=line.offset + at)]
        return value, problems

    def _read(
        self, text: str, decode: Callable[[], tuple[object, int]]
    ) -> tuple[object, list[Problem], int | None]:
        self._problems = []
        try:
            value, end = decode()
        except json.JSONDecodeError as error:
            near = text[max(error.pos - _NEAR // 2, 0) : error.pos + _NEAR // 2]
            where = f"near {near!r}" if error.pos < len(text) else "at the end of the line"
            return None, [faults.BROKEN_JSON(error.colno, where=where, why=error.msg)], None
        except RecursionError:
            why = "its brackets are nested too deeply"
        except ValueError:  # an integer with more digits than Python converts
            why = "it holds a number with thousands of digits"
        else:
            return value, self._problems, end
        return None, [faults.UNREADABLE_JSON(why=why)], None

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._problems.append(faults.REPEATED_KEY(key=key))
                seen.add(key)
        return value


_PLAIN_KEYS = {"messages", *CARRIED}


class CheckedRow(NamedTuple):
    """A row without fault; `written` is None where its line in the source will do."""

    form: str
    texts: list[str]
    has_system: bool
    joined: bytes
    written: bytes | None
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unlearnt: int = 0  # one bit for each message: set where an answer is only context

    @classmethod
    def rewritten(cls, row: Row, extra: Mapping[str, object]) -> CheckedRow:
        """A row that is written in another form than it was read in."""
        messages = row.messages
        texts = [message.content for message in messages]
        written = encode({"messages": [message.to_dict() for message in messages], **extra})
        has_system = messages[0].role == "system"
        unlearnt = sum(1 << place for place, turn in enumerate(messages) if not turn.learn)
        return cls(
            str(row.form), texts, has_system, join(texts), written, row.unused, row.notes, unlearnt
        )


# Escapes that may be a character which no text may have, or a colon.
_DOUBTFUL = re.compile(rb"\\(?:[bf]|u00[013789])")


def check_line(line: Line, reader: StrictJson) -> CheckedRow | list[Problem]:
    """A line as a checked row, or all that is wrong with it."""
    # orjson takes a third of the time of Python's json. It refuses NaN, halves of surrogate pairs
    # and raw control bytes as well, but drops a repeated key. Every key has a colon, and so have
    # only texts: one more in the line than in the row shows that a key was dropped. Whatever is
    # doubtful is left to the strict reader.
    data = line.data
    if not (_DOUBTFUL.search(data) or b"\x7f" in data or has_c1_controls(data)):
        try:
            row = orjson.loads(data)
        except orjson.JSONDecodeError:
            row = None
        plain = _plain_row(row, data, is_fit=True) if isinstance(row, dict) else None
        if plain is not None:
            colons = len(row) + 2 * len(plain.texts) + plain.joined.count(b":")
            colons += sum(value.count(":") for key, value in row.items() if key != "messages")
            if colons == data.count(b":"):
                return plain
    return check_row(*reader.read_line(line), data)


def check_row(
    value: object, problems: Sequence[Problem] = (), line: bytes = b""
) -> CheckedRow | list[Problem]:
    """A JSON value as a checked row, or all that is wrong with it.

    `problems` are those of reading the value; `line` is the line that it was read from.
    """
    if not isinstance(value, dict):
        kinds = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
        kind = kinds.get(type(value), "a number")
        return [*problems] or [faults.NOT_AN_OBJECT(kind=kind)]
    if not problems and (plain := _plain_row(value, line)):
        return plain
    row = read_row(value)
    extra, wrong = carried(value)
    problems = [*problems, *row.problems, *wrong]
    if problems or row.form is None:
        return problems
    return CheckedRow.rewritten(row, extra)


def _plain_row(row: dict[str, Any], line: bytes, *, is_fit: bool = False) -> CheckedRow | None:
    """A row in its plainest form, which needs no rewriting: some three times as fast as `read_row`.

    Plain are messages of two keys each, texts that are not blank, roles in order, and no other
    keys but texts that are carried along.
    """
    messages = row.get("messages")
    if type(messages) is not list or not row.keys() <= _PLAIN_KEYS:
        return None
    # No loop of our own: this runs for every message of every row.
    try:
        texts = [message["content"] for message in messages]
        roles = [message["role"] for message in messages]
        joined = join(texts)
        more = join([value for key, value in row.items() if key != "messages"])
    except (KeyError, TypeError, IndexError, UnicodeEncodeError):
        return None  # something is not an object or not text, or half of a surrogate pair
    count = len(roles)
    if sum(map(len, messages)) != 2 * count or count < 2 or roles != _roles(count):
        return None
    if "" in texts or any(map(str.isspace, texts)):
        return None
    if not is_fit and (
        has_unfit_characters(joined, count - 1) or has_unfit_characters(more, max(len(row) - 2, 0))
    ):
        return None
    is_written = line[:1] == b"{" and line[-1:] == b"}"
    written = None if is_written else line.removeprefix(codecs.BOM_UTF8).strip() or encode(row)
    return CheckedRow("messages", texts, count % 2 == 1, joined, written)


def join(texts: Sequence[str]) -> bytes:
    """All texts of a conversation; no checked text holds a NUL, so different ones stay apart."""
    return "\0".join(texts).encode()


@lru_cache(256)
def _roles(count: int) -> list[str]:
    """The roles of this many messages: an odd number has a system message."""
    turns = ["user", "assistant"] * (count // 2)
    return ["system", *turns] if count % 2 else turns


def encode(value: object) -> bytes:
    """Any JSON value in its shortest form, in UTF-8."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
