"""What a stage shows: the line of its plan beforehand, then its progress, and nothing else.

Reads and writes no files; `captured_output` keeps what libraries print off the screen.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

_GUESS_AFTER = 2.0  # seconds of counting: the first counts of a stage are its slowest

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


class TimeLeft:
    """A guess of the time left, from the counts so far; a count of something else starts it over.

    It starts at the first count, so what an earlier run had done does not look fast.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = 0
        self._first = self._last = (0, 0.0)  # (done, seconds)

    def after(self, done: int, total: int) -> str:
        """`about 40 s left`; empty where it is not known yet."""
        now = self._clock()
        if total != self._total or done < self._last[0]:
            self._total, self._first, self._last = total, (done, now), (done, now)
        if done > self._last[0]:
            self._last = (done, now)
        counted, took = self._last[0] - self._first[0], self._last[1] - self._first[1]
        if not total or took < _GUESS_AFTER:
            return ""
        seconds = took / counted * (total - done) - (now - self._last[1])
        if seconds < 1:
            return ""
        return (
            f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"
        )


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
