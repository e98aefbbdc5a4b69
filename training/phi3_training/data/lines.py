"""The lines of a chat file as bytes, in flat memory, with what is wrong with them as bytes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from .arrays import U8, Ints
from .faults import Problem

# After a backslash: `b`, `f`, and `u00` with one of these digits, are C0, DEL, C1 or a colon.
_DOUBTFUL_DIGITS = np.frombuffer(b"013789", np.uint8)

LINE_LIMIT = 1 << 20
BOM = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
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
    """Some lines that follow on each other, without their LF; the last may have been cut short.

    `text` holds the lines with their LF, and perhaps more behind them.
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

    Holds one line more than that at most, of limited size.
    """
    offset = part.start
    if offset:
        stream.seek(offset - 1)
        # Of the line before ours. One that fills the whole range is not read to its end here.
        offset += _rest_of_line(stream, part.end - offset + 1)
    while offset < part.end and (text := stream.read(min(_STEP, part.end - offset))):
        lines = text.split(b"\n")
        behind, cut = offset + len(text), 0
        rest = lines.pop()
        if rest and lines and behind < part.end:
            behind -= len(rest)  # read again with the next ones: cheaper than to join them
            stream.seek(behind)
        elif rest:
            more = stream.readline(LINE_LIMIT + 1)
            text += more
            lines.append(rest + more.removesuffix(b"\n"))
            cut = 0 if more.endswith(b"\n") else _rest_of_line(stream)
            behind = stream.tell()
        yield Chunk(offset, text, lines, cut)
        offset = behind


def _rest_of_line(stream: BinaryIO, most: int = sys.maxsize) -> int:
    size = 0
    while size < most and (data := stream.readline(_CHUNK)):
        size += len(data)
        if data.endswith(b"\n"):
            return size - 1
    return size


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
        return None, [_too_long(line)]
    if control := _CONTROL.search(line.data):
        return None, [_control_byte(line, control)]
    try:
        return line.data.decode("utf-8"), []
    except UnicodeDecodeError as error:
        return None, [_not_utf8(line, error.start)]


def whole_file_problem(first: Line) -> Problem | None:
    """What the first line tells about a file that is no JSON lines at all."""
    if first.data.startswith(_UTF16_MARKS):
        return Problem(
            "not-utf8",
            "the file is UTF-16, not UTF-8",
            "save it as UTF-8 without a byte-order mark",
        )
    if first.data.strip() == b"[":
        return Problem(
            "json-array",
            "the file is one JSON array over many lines, not JSON lines",
            "name it .json, or write one object per line, e.g. with: jq -c '.[]' OLD > NEW",
        )
    return None


def byte_order_mark() -> Problem:
    """The fault of a first line that starts with the UTF-8 mark."""
    return Problem(
        "byte-order-mark",
        "the file starts with a byte-order mark (BOM)",
        "save it as UTF-8 without BOM",
    )


def blank(count: int) -> Problem:
    """The fault of blank lines with conversations after them."""
    what = "a blank line" if count == 1 else f"{count} blank lines"
    return Problem("blank-line", f"{what} between conversations", "take blank lines out")


def crlf(count: int) -> Problem:
    """The one fault of a file with Windows line ends, told at its first such line."""
    lines = "1 line ends" if count == 1 else f"{count} lines end"
    return Problem(
        "crlf",
        f"{lines} with CRLF (Windows line ends), this is the first",
        "save the file with LF line ends, e.g. with: sed -i 's/\\r$//' FILE",
    )


def _too_long(line: Line) -> Problem:
    return Problem(
        "line-too-long",
        f"a line of {line.size / 1e6:.1f} MB; the limit is {LINE_LIMIT >> 20} MiB",
        "split the conversation, or check that line ends are not missing",
    )


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
