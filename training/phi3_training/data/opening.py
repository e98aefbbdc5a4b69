"""Opens text files as UTF-8 without a mark, however they are encoded, and packed with gzip or not.

Memory holds one piece of a file at a time. A gzip file that unpacks to far more than chats do is
refused while it is read.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .faults import Problem

Note = Callable[[str], None]  # takes what a person should know of a file, each thing once

_PIECE = 1 << 18  # bytes held at once
_HEAD = 1 << 12
_GZIP = b"\x1f\x8b"  # RFC 1952, 2.3.1
# UTF-32's mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FOREIGN = (
    (b"PK\x03\x04", "a zip file or an Excel workbook", "unpack it, or save the sheet as CSV UTF-8"),
    (b"BZh", "packed with bzip2", "unpack it, e.g. with: bunzip2 FILE"),
    (b"\xfd7zXZ\0", "packed with xz", "unpack it, e.g. with: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "unpack it, e.g. with: unzstd FILE"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"ARROW1\0\0", "an Arrow file", "name it .arrow"),
)
# Gzip makes text of chats 3 to 30 times smaller, and nothing more than 1032 times.
MOST_UNPACKED = 64 << 20  # bytes that any gzip file may unpack to
MOST_TIMES = 100  # and how many times its own size a larger one may
# Windows-1252: what it leaves undefined, and how much of the letters of a Western language is
# not ASCII (5 in 100 of French); Cyrillic in Windows-1251 is nearly nothing else.
_UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_LETTERS = re.compile(rb"[A-Za-z\x80-\xff]")
_UTF8_PAIR = re.compile(rb"[\xc3-\xf4][\x80-\xbf]")
_WORD = re.compile(rb"[A-Za-z\x80-\xff]{0,20}[\x80-\xff][A-Za-z\x80-\xff]{0,20}")
_MOST_FOREIGN = 0.25


class BrokenFileError(ValueError):
    """A file whose bytes cannot be read to their end; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


class Encoding(NamedTuple):
    """How the bytes of a file become text, judged by its first bytes."""

    packed: bool = False
    codec: str = "utf-8"
    mark: bytes = b""

    @property
    def is_plain(self) -> bool:
        """Whether the file itself is UTF-8, so that it can be read from any place."""
        return not self.packed and self.codec == "utf-8"

    def report(self, note: Note) -> None:
        """Note what is unusual."""
        if self.packed:
            note("unpacked with gzip")
        if self.mark and self.codec == "utf-8":
            note("a byte-order mark (BOM) at its start was skipped")
        elif self.mark:
            note(f"read as {self.codec.upper()}, as its byte-order mark says")
        elif self.codec != "utf-8":
            note(f"read as {self.codec.upper()}, because every other byte is zero")


PLAIN = Encoding()


def encoding_of(path: Path) -> Encoding:
    """The encoding of a file. Raises OSError, and BrokenFileError for what is no text."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    packed = head.startswith(_GZIP)
    if packed:
        with _Unpacked(path) as unpacked:
            head = unpacked.read(_HEAD)
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            inside = "after unpacking with gzip it is" if packed else "it is"
            raise BrokenFileError(Problem("not-text", f"{inside} {what}", fix))
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return Encoding(packed, codec, mark)
    return Encoding(packed, _utf16_without_mark(head) or "utf-8")


def _utf16_without_mark(head: bytes) -> str | None:
    """What Windows programs write for "Unicode" at times: most letters have a zero byte."""
    even, odd = head[::2], head[1::2]
    for codec, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if len(head) >= 8 and 0 not in others and zeros.count(0) > len(zeros) / 2:
            return codec
    return None


def open_text(path: Path, encoding: Encoding) -> BinaryIO:
    """The file as a stream of UTF-8 without a mark.

    Its reads raise BrokenFileError where the file cannot be unpacked or decoded.
    """
    stream: BinaryIO = io.BufferedReader(_Unpacked(path)) if encoding.packed else path.open("rb")
    if encoding.codec == "utf-8":
        stream.read(len(encoding.mark))
        return stream
    return io.BufferedReader(_Recoded(stream, encoding.codec), _PIECE)


class _Unpacked(io.RawIOBase):
    """What is in a gzip file, up to a limit."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._stream = gzip.open(path)  # noqa: SIM115 - closed with this
        self._most = max(MOST_UNPACKED, MOST_TIMES * path.stat().st_size)
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            piece = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = f"the gzip file is damaged or incomplete ({error}); the rest was not read"
            fix = "copy or download it again"
            raise BrokenFileError(Problem("broken-gzip", what, fix)) from None
        buffer[: len(piece)] = piece
        self._given += len(piece)
        if self._given > self._most:
            what = f"the gzip file unpacks to more than {self._most >> 20} MiB"
            fix = f"unpack it yourself if that is right (chats rarely shrink {MOST_TIMES} times)"
            raise BrokenFileError(Problem("gzip-too-large", what, fix))
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Recoded(io.RawIOBase):
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO, codec: str) -> None:
        super().__init__()
        self._stream, self._codec = stream, codec
        self._decoder = codecs.getincrementaldecoder(codec)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            piece = self._stream.read(_PIECE)
            try:
                self._ready = self._decoder.decode(piece, not piece).encode()
            except UnicodeError:
                name = self._codec.upper()
                what = f"the file starts as {name}, but is not valid {name}"
                fix = "save it as UTF-8"
                problem = Problem("not-utf8", f"{what}; the rest was not read", fix)
                raise BrokenFileError(problem) from None
            if not piece:
                break
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


def table_encoding(path: Path, note: Note) -> Encoding:
    """The encoding of a CSV file: what Excel writes has no mark where it is not UTF-8.

    Such a file is read as Windows-1252, which is said with a word of it, so that a person sees
    whether it was. Raises BrokenFileError where it cannot be that either.
    """
    encoding = encoding_of(path)
    if encoding.codec != "utf-8":
        return encoding
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_utf8, foreign, letters, example = True, 0, 0, ""
    pairs = undefined = 0
    with open_text(path, encoding) as stream:
        while piece := stream.read(_PIECE):
            if is_utf8:
                try:
                    decoder.decode(piece)
                except UnicodeDecodeError:
                    is_utf8 = False
            if not piece.isascii():
                foreign += len(_NOT_ASCII.findall(piece))
                letters += len(_LETTERS.findall(piece))
                pairs += len(_UTF8_PAIR.findall(piece))
                undefined += len(_UNDEFINED.findall(piece))
                word = _WORD.search(piece)
                example = example or (word.group().decode("cp1252", "replace") if word else "")
    if is_utf8 and not decoder.getstate()[0]:
        return encoding
    # Letters of UTF-8 in between: a damaged UTF-8 file, which would be read as other letters.
    if undefined or pairs * 2 > foreign or foreign > _MOST_FOREIGN * letters:
        what = "the file is neither UTF-8 nor Windows-1252, as Excel writes Western languages"
        raise BrokenFileError(Problem("not-utf8", what, "save it as CSV UTF-8"))
    note(f"read as Windows-1252, because it is not UTF-8 (one of its words: {example!r})")
    return encoding._replace(codec="cp1252")
