"""The lines of a chat file as bytes, in flat memory, with what is wrong with them as bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

from .faults import Problem

LINE_LIMIT = 1 << 20
BOM = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_CHUNK = 1 << 16
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Line(NamedTuple):
    """One line without its LF. A line beyond the limit has its true size and no data."""

    number: int
    offset: int
    data: bytes
    size: int

    @property
    def is_too_long(self) -> bool:
        """Whether the line was beyond the limit, so that its data was let go."""
        return self.size > LINE_LIMIT and not self.data

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing on the line but spaces."""
        return not self.is_too_long and not self.data.strip()


class Digest(Protocol):
    """What takes the bytes as they are read, such as hashlib.sha256()."""

    def update(self, data: bytes, /) -> None: ...


def numbered_lines(stream: BinaryIO, digest: Digest) -> Iterator[Line]:
    """The lines from 1 on; never holds more than the limit."""
    number = offset = 0
    while data := stream.readline(LINE_LIMIT + 1):
        digest.update(data)
        number, size = number + 1, len(data)
        if size > LINE_LIMIT and not data.endswith(b"\n"):
            size += _skip_line(stream, digest)
            data = b""
        yield Line(number, offset, data.removesuffix(b"\n"), size)
        offset += size


def _skip_line(stream: BinaryIO, digest: Digest) -> int:
    size = 0
    while data := stream.readline(_CHUNK):
        digest.update(data)
        size += len(data)
        if data.endswith(b"\n"):
            break
    return size


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
            "write one object per line, e.g. with: jq -c '.[]' OLD > NEW",
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
