"""Rows of JSON text that is no JSON lines: an array, an object around one, pretty-printed rows.

They are read one by one: memory holds one row, not the file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .faults import Problem
from .formats import read_row
from .jsonl import LINE_LIMIT, StrictJson
from .opening import Encoding, Note, open_text

_CHUNK = 1 << 16
_SPACES = " \t\r\n"


class Raw(NamedTuple):
    """A row as a reader gives it, with what was wrong on the way.

    `row` numbers the rows of a file in which several may share a line; else it is 0.
    """

    line: int
    value: Any
    problems: list[Problem]
    row: int = 0


def is_document(path: Path, encoding: Encoding) -> bool:
    """Whether a file is to be read here, judged by its first MiB.

    Raises OSError, and BrokenFileError for what cannot be unpacked.
    """
    with open_text(path, encoding) as stream:
        head = stream.read(LINE_LIMIT + 1).decode("utf-8", "ignore")
    text = head.lstrip()
    if not text.startswith(("{", "[")):
        return False
    line, _, rest = text.partition("\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return _goes_over_lines(path, line, text)
    if rest.strip():  # a row to a line, whatever they are
        return isinstance(value, list) and ".json" in _suffixes(path)
    return isinstance(value, list) or _wrapped(value) is not None


def _suffixes(path: Path) -> list[str]:
    return [suffix.lower() for suffix in path.suffixes[-2:]]


def _goes_over_lines(path: Path, line: str, text: str) -> bool:
    """Whether text whose first line is no JSON is one value over many lines, not a broken row."""
    line = line.rstrip()
    if ".json" in _suffixes(path) and line.startswith("["):
        return True
    if line.startswith("["):
        return line[1:].lstrip()[:1] in ("", "{", "]")
    if len(line) > LINE_LIMIT:  # no row is that long
        return True
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        # Cut off by the size that is looked at; or broken, but written over lines.
        cut = len(text) > LINE_LIMIT // 2 and error.pos > len(text) - _CHUNK
        return cut or (line.endswith(("{", "[", ",")) and not _row_follows(text))
    except (ValueError, RecursionError):
        return False
    return True


def _row_follows(text: str) -> bool:
    """Whether the second line is a row of its own."""
    try:
        return isinstance(json.loads(text.split("\n")[1]), dict)
    except (ValueError, IndexError, RecursionError):
        return False


def _wrapped(value: object) -> str | None:
    """The key of the one list of rows that an object holds, if it is no row itself."""
    if not isinstance(value, dict) or read_row(value)[0] is not None:
        return None
    lists = [key for key, inside in value.items() if _are_rows(inside)]
    return lists[0] if len(lists) == 1 else None


def _are_rows(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not _is_message(value[0])
    )


def _is_message(value: dict[str, object]) -> bool:
    return "role" in value or "from" in value


def document_rows(path: Path, encoding: Encoding, note: Note) -> Iterator[Raw]:
    """The rows of a file, each with the line that it starts on and its number."""
    with io.TextIOWrapper(open_text(path, encoding), encoding="utf-8", newline="\n") as stream:
        try:
            yield from _Document(stream, note).read()
        except UnicodeDecodeError:
            yield Raw(0, None, [Problem("not-utf8", "the file is not UTF-8", "save it as UTF-8")])


class _Document:
    """Walks over JSON text with a window of limited size."""

    def __init__(self, stream: TextIO, note: Note) -> None:
        self._stream, self._note = stream, note
        self._text = ""
        self._place = 0
        self._line = 1
        self._row = 0
        self._json = StrictJson()

    def read(self) -> Iterator[Raw]:
        """All rows; what breaks the text ends the reading."""
        if self._peek() == "[":
            self._note("read as one JSON array")
            if (yield from self._array()) and self._peek():
                yield self._broken("there is text after the JSON array", "remove it")
        elif key := self._wrapping_key():
            self._note(f"its rows are the list under the key {key!r}")
            if (yield from self._array()):
                yield from self._rest_of_wrapper()
        else:
            self._note("read as JSON rows over several lines")
            while self._peek() and (yield from self._one()):
                if self._peek() == ",":
                    self._place += 1

    def _array(self) -> Generator[Raw, None, bool]:
        """The elements of an array; whether it was read to its end."""
        self._place += 1  # the bracket
        if self._peek() == "]":
            self._place += 1
            return True
        while (yield from self._one()):
            mark = self._peek()
            self._place += 1
            if mark == "]":
                return True
            if mark != ",":
                where = f"near {mark!r}" if mark else "at the end of the file"
                what = f"the JSON array is broken {where}; the rest was not read"
                yield self._broken(what, "write rows with commas between them, and ] at the end")
                return False
        return False

    def _one(self) -> Generator[Raw, None, bool]:
        self._peek()
        line, self._row = self._line, self._row + 1
        while True:
            value, problems, end = self._json.read_at(self._text, self._place)
            whole = end is not None and end < len(self._text)
            if whole or len(self._text) - self._place > LINE_LIMIT or not self._more():
                break
        if end is None:
            problems = [problems[0]._replace(column=None)]
            if len(self._text) - self._place > LINE_LIMIT:
                what = f"the row is broken or larger than {LINE_LIMIT >> 20} MiB"
                problems = [Problem("line-too-long", what, "split the conversation")]
        yield Raw(line, value, problems, self._row)
        if end is None:
            return False
        self._go_to(end)
        return True

    def _broken(self, what: str, fix: str) -> Raw:
        return Raw(self._line, None, [Problem("broken-json", what, fix)], self._row)

    def _wrapping_key(self) -> str | None:
        """The key of the list of rows in the object that starts here; then its [ is next.

        None, and nothing is read, where the object is no wrapper.
        """
        while len(self._text) <= LINE_LIMIT and self._more():
            pass
        decoder, text = json.JSONDecoder(), self._text
        try:
            whole, _ = decoder.raw_decode(text, self._place)
            if read_row(whole)[0] is not None:
                return None
        except (ValueError, RecursionError):
            pass  # larger than the window, or broken further on
        try:
            place = _next(text, self._place + 1)
            while text[place] == '"':
                key, place = decoder.raw_decode(text, place)
                place = _next(text, _next(text, place) + 1)
                inside = _next(text, place + 1)
                if text[place] == "[" and text[inside] == "{" and _starts_row(text, inside):
                    self._go_to(place)
                    return str(key)
                _, place = decoder.raw_decode(text, place)
                place = _next(text, _next(text, place) + 1)
        except (ValueError, IndexError, RecursionError):
            pass
        return None

    def _rest_of_wrapper(self) -> Iterator[Raw]:
        """What comes after the list: short things, of which another list of rows is a fault."""
        while len(self._text) - self._place <= LINE_LIMIT and self._more():
            pass
        rest = self._text[self._place :]
        try:
            value = json.loads("{" + rest.lstrip().removeprefix(","))
        except (ValueError, RecursionError):
            what = "the JSON object is broken after its list of rows"
            yield self._broken(what, "close it with }")
            return
        if more := [key for key, inside in value.items() if _are_rows(inside)]:
            what = f"a second list of rows, under the key {more[0]!r}"
            yield self._broken(what, "keep each list in a file of its own")

    def _peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            self._go_to(_next(self._text, self._place))
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _more(self) -> bool:
        chunk = self._stream.read(max(_CHUNK, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)


def _next(text: str, place: int) -> int:
    """The place of the next character that is not a space."""
    while place < len(text) and text[place] in _SPACES:
        place += 1
    return place


def _starts_row(text: str, place: int) -> bool:
    """Whether the object at a place is a row, not a message; one that is cut off is a row."""
    try:
        return not _is_message(json.JSONDecoder().raw_decode(text, place)[0])
    except (ValueError, RecursionError):
        return True
