"""What a stage shows: the line of its plan beforehand, then its progress, and nothing else.

Reads and writes no files; `captured_output` keeps what libraries print off the screen.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

# progress(done, total, text): total 0 means "how much is not known".
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class PlanLine:
    """One thing that `up` would do, or that would stop it; `details` are for `-o json`."""

    stage: str
    text: str
    stops: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


def no_progress(_done: int, _total: int, _text: str) -> None:
    """Shows nothing: for callers without a display."""


def note(progress: Progress, text: str) -> None:
    """Report work of unknown length."""
    progress(0, 0, text)


class _ThreadTee(io.TextIOBase):
    """Takes what one thread writes; lets other threads (a progress display) through."""

    def __init__(self, sink: io.StringIO, other: TextIO) -> None:
        self._sink = sink
        self._other = other
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        stream = self._sink if threading.get_ident() == self._owner else self._other
        return int(stream.write(text) or 0)

    def flush(self) -> None:
        self._other.flush()

    def isatty(self) -> bool:
        return not self._other.closed and self._other.isatty()

    def fileno(self) -> int:
        return self._other.fileno()


@contextlib.contextmanager
def captured_output(sink: io.StringIO) -> Iterator[None]:
    """Keep this thread's prints off the user's screen."""
    with (
        contextlib.redirect_stdout(_ThreadTee(sink, sys.stdout)),
        contextlib.redirect_stderr(_ThreadTee(sink, sys.stderr)),
    ):
        yield
