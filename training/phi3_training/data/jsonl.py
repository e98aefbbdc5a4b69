"""Reads lines of JSON quickly where nothing can be wrong with them; leaves all others alone.

Every line that is not accepted here is read by the strict reader, which alone names faults. What
is accepted is what the strict reader accepts, with the same values; the comments say why.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

from .arrays import U8, Ints
from .conversation import CARRIED, check_characters
from .faults import Problem
from .formats import Row, carried, read_row

# The lines of a chat file as bytes, in flat memory, with what is wrong with them as bytes.

# After a backslash: `b`, `f`, and `u00` with one of these digits, are C0, DEL, C1 or a colon.
_DOUBTFUL_DIGITS = np.frombuffer(b"013789", np.uint8)

LINE_LIMIT = 1 << 20
_CHUNK = 1 << 16
_STEP = 1 << 18
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
        """Whether the line was beyond the limit, so that its data was let go."""
        return self.size > LINE_LIMIT

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing on the line but spaces."""
        return not self.is_too_long and not self.data.strip()


class Chunk(NamedTuple):
    """Some consecutive lines, without their LF; the last may be truncated.

    `text` holds the lines with their LF, and perhaps more after them.
    """

    offset: int
    text: bytes
    lines: list[bytes]
    cut: int = 0

    @property
    def ends(self) -> Ints:
        """Behind which place of `text` each line ends, with its LF."""
        return np.cumsum([len(line) + 1 for line in self.lines])

    def line(self, index: int, number: int, offset: int) -> Line:
        """A line by its index, with its number and its place in the file."""
        data = self.lines[index]
        size = len(data) + (self.cut if index == len(self.lines) - 1 else 0)
        return Line(number, offset, data if size <= LINE_LIMIT else b"", size)


def chunks(stream: BinaryIO, part: Range) -> Iterator[Chunk]:
    """The lines of a range, some hundred kilobytes at a time.

    Holds one line more than that at most, of limited size. Seeks once, unless the range is the
    start.
    """
    offset = part.start
    if offset:
        stream.seek(offset - 1)
        # Of the line before ours. One that fills the whole range is not read to its end here.
        size, has_end = _rest_of_line(stream, part.end - offset + 1)
        offset += size + has_end - 1
    rest = b""
    while (wanted := part.end - offset - len(rest)) > 0:
        new = stream.read(min(_STEP, wanted))
        text, cut, has_end = rest + new, 0, False
        lines = text.split(b"\n")
        rest = lines.pop()
        if rest and (not new or not lines or len(new) == wanted):
            more = stream.readline(LINE_LIMIT + 1)
            has_end = more.endswith(b"\n")
            lines.append(rest + more.removesuffix(b"\n"))
            text, rest = text + more, b""
            if more and not has_end:
                cut, has_end = _rest_of_line(stream)
                cut += has_end
        if lines:
            yield Chunk(offset, text, lines, cut - (cut > 0 and has_end))
        if not new:
            return
        offset += len(text) - len(rest) + cut


def _rest_of_line(stream: BinaryIO, most: int = sys.maxsize) -> tuple[int, bool]:
    """How many bytes the line still has, and whether a line end follows them."""
    size = 0
    while size < most and (data := stream.readline(_CHUNK)):
        size += len(data)
        if data.endswith(b"\n"):
            return size - 1, True
    return size, False


def doubtful_lines(chunk: Chunk) -> set[int]:
    """The indices of lines that may hold a character which no text may have.

    Beside raw controls, which JSON forbids, those are a DEL, a C1 control in UTF-8, and what an
    escape writes. An escaped colon is doubtful too: colons are counted to find repeated keys.
    """
    data = np.frombuffer(chunk.text, np.uint8)
    found = [_doubtful_escapes(data)]
    if b"\xc2" in chunk.text:
        places = np.flatnonzero(data[:-1] == 0xC2)
        found.append(places[data[places + 1] < 0xA0])
    if b"\x7f" in chunk.text:
        found.append(np.flatnonzero(data == 0x7F))
    places = np.concatenate(found)
    if not len(places):
        return set()
    return set(np.searchsorted(chunk.ends, places, side="right").tolist())


def _doubtful_escapes(data: U8) -> Ints:
    places = np.flatnonzero(data[:-1] == ord("\\"))
    after = data[places + 1]
    short = places[(after == ord("b")) | (after == ord("f"))]
    coded = places[(after == ord("u")) & (places < len(data) - 4)]
    zeros = (data[coded + 2] == ord("0")) & (data[coded + 3] == ord("0"))
    coded = coded[zeros & np.isin(data[coded + 4], _DOUBTFUL_DIGITS)]
    return np.concatenate([short, coded])


def decode(line: Line) -> tuple[str | None, list[Problem]]:
    """The line's text, or None and why there is none."""
    if line.is_too_long:
        what = f"the line has {line.size / 1e6:.1f} MB; the limit is {LINE_LIMIT >> 20} MiB"
        fix = "split the conversation, or check for missing line endings"
        return None, [Problem("line-too-long", what, fix)]
    if control := _CONTROL.search(line.data):
        return None, [_control_byte(line, control)]
    try:
        return line.data.decode("utf-8"), []
    except UnicodeDecodeError as error:
        return None, [_not_utf8(line, error.start)]


def _control_byte(line: Line, match: re.Match[bytes]) -> Problem:
    byte, start = match.group()[0], match.start()
    name = "a NUL byte" if byte == 0 else f"the control byte 0x{byte:02x}"
    return Problem(
        "control-character",
        f"{name} at byte {start + 1} of the line (byte {line.offset + start + 1} of the file)",
        "remove it",
    )


def _not_utf8(line: Line, start: int) -> Problem:
    return Problem(
        "not-utf8",
        f"not UTF-8: byte 0x{line.data[start]:02x} at byte {start + 1} of the line "
        f"(byte {line.offset + start + 1} of the file)",
        "save the file as UTF-8",
    )


# JSON of one line, read strictly: repeated keys, NaN and Infinity are problems, not values.

_NEAR = 24


class StrictJson:
    """A decoder to be used for many lines; `read` gives the value and all its problems."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant
        )

    def read(self, text: str) -> tuple[Any, list[Problem]]:
        """The value of a line; it is None when the line is not JSON."""
        value, problems, _ = self._read(text, lambda: (self._decoder.decode(text), len(text)))
        return value, problems

    def read_at(self, text: str, place: int) -> tuple[Any, list[Problem], int | None]:
        """The value that starts at a place, and where it ends; None if it is incomplete."""
        return self._read(text, lambda: self._decoder.raw_decode(text, place))

    def _read(
        self, text: str, decode: Callable[[], tuple[Any, int]]
    ) -> tuple[Any, list[Problem], int | None]:
        self._problems = []
        try:
            value, end = decode()
        except json.JSONDecodeError as error:
            return None, [_broken(text, error)], None
        except RecursionError:
            return None, [_unreadable("its brackets are nested too deeply")], None
        except ValueError:  # an integer with more digits than Python converts
            return None, [_unreadable("it holds a number with thousands of digits")], None
        return value, self._problems, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    what = f"the key {key!r} occurs twice in one object"
                    fix = "keep one of them: JSON does not define which one counts"
                    self._problems.append(Problem("repeated-key", what, fix))
                seen.add(key)
        return value

    def _constant(self, name: str) -> None:
        self._problems.append(
            Problem(
                "not-a-number", f"{name} is not a JSON value", "write null or leave the key out"
            )
        )


def _broken(text: str, error: json.JSONDecodeError) -> Problem:
    near = text[max(error.pos - _NEAR // 2, 0) : error.pos + _NEAR // 2]
    where = f"near {near!r}" if error.pos < len(text) else "at the end of the line"
    return Problem(
        "broken-json",
        f"broken JSON {where} ({error.msg})",
        "write one whole JSON object on one line, with double quotes",
        error.colno,
    )


def _unreadable(why: str) -> Problem:
    return Problem(
        "broken-json", f"unreadable JSON: {why}", 'write {"messages": […]} as plain JSON'
    )


_PLAIN_KEYS = {"messages", *CARRIED}
_OPEN, _CLOSE = b"{}"
# Python refuses integers of more than 4300 digits, or a lower limit if set, but never below 640.
_DIGITS = bytes(48 if 48 <= byte < 58 else 120 for byte in range(256))
_LONG_NUMBER = b"0" * 640


class Sound(NamedTuple):
    """A row without fault; `written` is None where the line itself will do."""

    form: str
    texts: list[str]
    has_system: bool
    joined: bytes
    written: bytes | None
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unlearnt: int = 0  # one bit for each message: set where an answer is only context

    @classmethod
    def of(cls, row: Row, extra: Mapping[str, Any]) -> Sound:
        """A row that must be rewritten."""
        messages = row.messages
        texts = [message.content for message in messages]
        written = encode({"messages": [message.to_dict() for message in messages], **extra})
        has_system = messages[0].role == "system"
        unlearnt = sum(1 << place for place, one in enumerate(messages) if not one.learn)
        return cls(
            str(row.form), texts, has_system, join(texts), written, row.unused, row.notes, unlearnt
        )


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
    if len(line) > LINE_LIMIT:
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
    except (KeyError, TypeError, IndexError):  # something is not an object, or not text
        return None
    count = len(roles)
    if sum(map(len, messages)) != 2 * count or count < 2 or roles != _roles(count):
        return None
    return None if "" in texts or any(map(str.isspace, texts)) else (texts, joined)


@lru_cache(256)
def _roles(count: int) -> list[str]:
    """The roles of this many messages: an odd number has a system message."""
    turns = ["user", "assistant"] * (count // 2)
    return ["system", *turns] if count % 2 else turns


def _accept_other(row: dict[str, Any], line: bytes) -> Sound | None:
    """A row in another format or with more keys, through the general rules."""
    read = read_row(row)
    if read.problems or read.form is None or _hides_colon(line) or b"\x7f" in line:
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
    return Sound.of(read, extra)


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
