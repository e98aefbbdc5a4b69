"""One block of rows, read, checked and digested: the unit of work of one process.

Reads a range of bytes of a JSON lines file, or rows that another reader gives; writes the sound
rows to block files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .digest import Digest, Digester
from .fast_json import Sound, accept
from .faults import Problem
from .formats import carried, read_row
from .lines import (
    BOM,
    Chunk,
    Line,
    Range,
    byte_order_mark,
    chunks,
    decode,
    whole_file_problem,
)
from .strict_json import StrictJson

BLOCK = 1 << 23


class Raw(NamedTuple):
    """A row as a reader of another kind of file gives it, with what was wrong on the way."""

    line: int
    value: Any
    problems: list[Problem]


def digest_range(source: Path, part: Range, path: Path) -> Digest:
    """Read the lines that start in a range of a JSON lines file; the rows go to `path`."""
    digester = Digester(path)
    with source.open("rb") as stream, path.open("wb") as rows:
        strict = _Strict(digester.digest, at_start=part.start == 0)
        for chunk in chunks(stream, part):
            _digest_chunk(chunk, digester, strict, rows)
            if digester.digest.stop:
                break
    return digester.finish()


def _digest_chunk(chunk: Chunk, digester: Digester, strict: _Strict, rows: BinaryIO) -> None:
    offset, number = chunk.offset, digester.digest.lines
    for index, sound in enumerate(accept(chunk)):
        number += 1
        size = len(chunk.lines[index])
        if sound is None:
            sound = strict.read(chunk.line(index, number, offset))
        if sound is not None:
            digester.take(number, sound, offset, size, rows)
        elif digester.digest.stop:
            break
        offset += size + 1
    digester.digest.lines = number


def digest_rows(raws: Iterable[Raw], folder: Path, name: str) -> Iterator[Digest]:
    """The same for rows of other kinds of files, in blocks; `line` numbers are the file's own."""
    rows = iter(raws)
    number, more = 0, True
    while more:
        more = False
        digester = Digester(folder / f"{name}-{number:05}.jsonl")
        number += 1
        with digester.digest.path.open("wb") as stream:
            for raw in rows:
                found = _sound_or_problems(raw.value, raw.problems)
                if isinstance(found, Sound):
                    digester.take(raw.line, found, 0, 0, stream)
                else:
                    digester.digest.faults += [(raw.line, problem) for problem in found]
                digester.digest.filled = True
                if digester.written > BLOCK:
                    more = True
                    break
        yield digester.finish()


class _Strict:
    """Reads the lines that are not plainly sound, and notes all that is wrong with them."""

    def __init__(self, digest: Digest, *, at_start: bool) -> None:
        self._digest = digest
        self._at_start = at_start
        self._json = StrictJson()

    def read(self, line: Line) -> Sound | None:
        """The line's row, if it is sound."""
        if self._at_start and line.number == 1:
            if problem := whole_file_problem(line):
                self._digest.stop = True
                self._digest.fault(0, problem)
                return None
            if line.data.startswith(BOM):
                self._digest.fault(1, byte_order_mark())
                line = line._replace(data=line.data.removeprefix(BOM))
        if line.data.endswith(b"\r"):
            self._digest.add_crlf(line.number)
        if line.is_blank:
            self._digest.add_blank(line.number)
            return None
        self._digest.filled = True
        found = self._row(line)
        if isinstance(found, Sound):
            return found
        for problem in found:
            self._digest.fault(line.number, problem)
        return None

    def _row(self, line: Line) -> Sound | list[Problem]:
        text, problems = decode(line)
        if text is None:
            return problems
        return _sound_or_problems(*self._json.read(text))


def _sound_or_problems(value: Any, problems: list[Problem]) -> Sound | list[Problem]:
    """A row that was read strictly: sound, or all that is wrong with it."""
    if not isinstance(value, dict):
        return problems or [_not_an_object(value)]
    form, messages, found = read_row(value)
    extra, wrong = carried(value)
    problems = [*problems, *found, *wrong]
    if problems or form is None:
        return problems
    return Sound.of(form, messages, extra)


def _not_an_object(row: Any) -> Problem:
    kinds = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    what = f"the line is {kinds.get(type(row), 'a number')}, not an object"
    return Problem("not-an-object", what, 'write {"messages": […]}')
