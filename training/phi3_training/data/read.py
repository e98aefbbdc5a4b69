"""Reads chat files line by line, in flat memory. A fault never stops the reading: all are told."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from .compare import Seen
from .conversation import Conversation
from .faults import Fault, Problem, in_order
from .formats import carried, read_row
from .lines import (
    BOM,
    Line,
    blank,
    byte_order_mark,
    crlf,
    decode,
    numbered_lines,
    whole_file_problem,
)
from .strict_json import StrictJson


class _Run:
    """Lines that share one fault: the first of them, and how many."""

    def __init__(self) -> None:
        self.first = self.count = 0

    def add(self, number: int) -> None:
        self.first = self.first or number
        self.count += 1

    def __bool__(self) -> bool:
        return self.count > 0


class ChatFile:
    """One chat file. Once `conversations()` is used up, `faults` and the counts are complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[Fault] = []
        self.rows = 0
        self.several_turns = 0
        self.size = 0
        self.formats: Counter[str] = Counter()
        self._hash = hashlib.sha256()
        self._json = StrictJson()

    @property
    def sha256(self) -> str:
        """Of the bytes read."""
        return self._hash.hexdigest()

    def fault(self, line: int, problem: Problem) -> None:
        """Note a problem of this file."""
        self.faults.append(Fault.at(self.path, line, problem))

    def conversations(self) -> Iterator[Conversation]:
        """The sound conversations, in order."""
        try:
            with self.path.open("rb") as stream:
                yield from self._read(stream)
        except FileNotFoundError:
            self.fault(0, Problem("no-such-file", "no such file", "check its path and spelling"))
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            self.fault(0, Problem("unreadable", what, "name a file that you may read"))

    def _read(self, stream: BinaryIO) -> Iterator[Conversation]:
        crlf_lines, blank_lines, filled = _Run(), _Run(), False
        for raw in numbered_lines(stream, self._hash):
            self.size = raw.offset + raw.size
            if raw.number == 1 and (problem := whole_file_problem(raw)):
                self.fault(0, problem)
                return
            line = self._without_mark(raw) if raw.number == 1 else raw
            if line.data.endswith(b"\r"):
                crlf_lines.add(line.number)
            if line.is_blank:
                blank_lines.add(line.number)
                continue
            if blank_lines:  # blank lines at the end of a file are fine, so told only now
                self.fault(blank_lines.first, blank(blank_lines.count))
                blank_lines = _Run()
            filled = True
            if conversation := self._conversation(line):
                yield conversation
        self._end(crlf_lines, filled)

    def _end(self, crlf_lines: _Run, filled: bool) -> None:
        if crlf_lines:
            self.fault(crlf_lines.first, crlf(crlf_lines.count))
        if not filled:
            what = "the file holds no conversation" if self.size else "the file is empty"
            self.fault(0, Problem("no-rows", what, "write one conversation per line"))

    def _without_mark(self, line: Line) -> Line:
        if not line.data.startswith(BOM):
            return line
        self.fault(line.number, byte_order_mark())
        return line._replace(data=line.data.removeprefix(BOM))

    def _conversation(self, line: Line) -> Conversation | None:
        text, problems = decode(line)
        if text is not None:
            row, problems = self._json.read(text)
            if isinstance(row, dict):
                return self._from_row(line.number, row, problems)
            problems = problems or [_not_an_object(row)]
        for problem in problems:
            self.fault(line.number, problem)
        return None

    def _from_row(
        self, number: int, row: dict[str, Any], problems: list[Problem]
    ) -> Conversation | None:
        form, messages, found = read_row(row)
        extra, wrong = carried(row)
        problems = [*problems, *found, *wrong]
        for problem in problems:
            self.fault(number, problem)
        if problems or form is None:
            return None
        self.rows += 1
        self.formats[form] += 1
        conversation = Conversation(messages, self.path, number, extra)
        self.several_turns += conversation.turns > 1
        return conversation


def read_checked(file: ChatFile, seen: Seen) -> Iterator[Conversation]:
    """The file's conversations that were not seen before; a repeated one is a fault of the file."""
    for conversation in file.conversations():
        if problem := seen.repeated(conversation):
            file.fault(conversation.line, problem)
        else:
            yield conversation


def read_conversations(paths: Sequence[Path]) -> list[Conversation]:
    """All conversations of all files. Raises DataError with every fault of every file."""
    seen = Seen()
    files = [ChatFile(path) for path in paths]
    found = [conversation for file in files for conversation in read_checked(file, seen)]
    if faults := in_order(fault for file in files for fault in file.faults):
        raise DataError(faults)
    return found


def _not_an_object(row: Any) -> Problem:
    kinds = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    what = f"the line is {kinds.get(type(row), 'a number')}, not an object"
    return Problem("not-an-object", what, 'write {"messages": […]}')
