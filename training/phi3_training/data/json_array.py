"""A JSON file that is one array of rows, read row by row: memory holds one row, not the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .blocks import Raw
from .faults import Problem
from .lines import LINE_LIMIT
from .strict_json import StrictJson

_CHUNK = 1 << 16
_SPACES = " \t\r\n"


def is_array(path: Path) -> bool:
    """Whether the first character of a file that is not a space opens an array."""
    try:
        with path.open("rb") as stream:
            return stream.read(_CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return False


def array_rows(path: Path) -> Iterator[Raw]:
    """The elements of the array, each with the line that it starts on."""
    with path.open(encoding="utf-8-sig") as stream:
        try:
            yield from _Elements(stream).read()
        except UnicodeDecodeError:
            problem = Problem("not-utf8", "the file is not UTF-8", "save the file as UTF-8")
            yield Raw(0, None, [problem])


class _Elements:
    """Walks over the text of an array with a window of limited size."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._place = 0
        self._line = 1
        self._json = StrictJson()

    def read(self) -> Iterator[Raw]:
        """All elements; what breaks the array ends the reading."""
        self._peek()
        self._place += 1  # the bracket
        if self._peek() == "]":
            self._place += 1
            yield from self._end()
            return
        while True:
            self._peek()
            line = self._line
            value, problems, end = self._element()
            yield Raw(line, value, problems)
            if end is None:
                return
            self._go_to(end)
            mark = self._peek()
            self._place += 1
            if mark == "]":
                yield from self._end()
                return
            if mark != ",":
                where = "at the end of the file" if not mark else f"near {mark!r}"
                what = f"the array is broken {where}; what follows was not read"
                mend = "write rows with commas between them, and ] at the end"
                yield Raw(self._line, None, [Problem("broken-json", what, mend)])
                return

    def _end(self) -> Iterator[Raw]:
        if self._peek():
            what = "there is text after the array"
            yield Raw(self._line, None, [Problem("broken-json", what, "take it out")])

    def _element(self) -> tuple[object, list[Problem], int | None]:
        while True:
            value, problems, end = self._json.read_at(self._text, self._place)
            whole = end is not None and end < len(self._text)
            if whole or len(self._text) - self._place > LINE_LIMIT or not self._more():
                break
        if end is None:
            problems = [problems[0]._replace(column=None)]
            if len(self._text) - self._place > LINE_LIMIT:
                what = f"a row that is broken or beyond {LINE_LIMIT >> 20} MiB"
                problems = [Problem("line-too-long", what, "split the conversation")]
        return value, problems, end

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            start = self._place
            while start < len(self._text) and self._text[start] in _SPACES:
                start += 1
            self._go_to(start)
            if start < len(self._text):
                return self._text[start]
            if not self._more():
                return ""

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _more(self) -> bool:
        chunk = self._stream.read(max(_CHUNK, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)
