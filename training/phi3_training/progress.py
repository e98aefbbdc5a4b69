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
        # Less what has passed since the last count, so that it falls between two slow counts.
        seconds = took / counted * (total - done) - (now - self._last[1])
        if seconds < 1:
            return ""
        return (
            f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"
        )


class _Filter(io.TextIOBase):
    """Replaces standard output or error: what a capture takes goes there, the rest through."""

    def __init__(self, other: TextIO, *, is_error: bool) -> None:
        self._other = other
        self._is_error = is_error

    def write(self, text: str) -> int:
        thread = threading.current_thread()
        sinks = (sink for takes, sink in tuple(_captures) if takes(thread, self._is_error))
        return int((next(sinks, None) or self._other).write(text) or 0)

    def flush(self) -> None:
        self._other.flush()

    def isatty(self) -> bool:
        return not self._other.closed and self._other.isatty()

    def fileno(self) -> int:
        return self._other.fileno()


# The captures of all threads, and what they replaced. One filter serves them all: threads that
# each redirected the streams for themselves would put them back in another order than they came.
_captures: list[tuple[Callable[[threading.Thread, bool], bool], io.StringIO]] = []
_lock = threading.Lock()
_filtered = contextlib.ExitStack()


@contextlib.contextmanager
def captured_output(
    sink: io.StringIO, *, of_new_threads: bool = False, errors: bool = True
) -> Iterator[None]:
    """Keep this thread's prints off the user's screen, or those of all threads begun inside.

    `errors`: also what they write to standard error.
    """
    # Threads themselves, not their ids: a new thread may get the id of one that has ended.
    own, known = threading.current_thread(), set(threading.enumerate())

    def takes(thread: threading.Thread, is_error: bool) -> bool:
        is_meant = thread not in known if of_new_threads else thread is own
        return is_meant and (errors or not is_error)

    entry = (takes, sink)
    with _lock:
        if not _captures:
            out = _Filter(sys.stdout, is_error=False)
            err = _Filter(sys.stderr, is_error=True)
            _filtered.enter_context(contextlib.redirect_stdout(out))
            _filtered.enter_context(contextlib.redirect_stderr(err))
        _captures.insert(0, entry)  # the innermost counts
    try:
        yield
    finally:
        with _lock:
            _captures.remove(entry)
            if not _captures:
                _filtered.close()
