"""Keeps what libraries print off the user's screen, without hiding a progress display."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from typing import Any


class _ThreadTee(io.TextIOBase):
    """Takes what one thread writes; lets other threads (a progress display) through."""

    def __init__(self, sink: io.StringIO, other: Any) -> None:
        self._sink = sink
        self._other = other
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        stream = self._sink if threading.get_ident() == self._owner else self._other
        return int(stream.write(text) or 0)

    def flush(self) -> None:
        self._other.flush()

    def isatty(self) -> bool:
        return bool(self._other.isatty())

    def fileno(self) -> int:
        return int(self._other.fileno())


@contextlib.contextmanager
def captured_output(sink: io.StringIO) -> Iterator[None]:
    """Keep this thread's prints off the user's screen."""
    out, err = sys.stdout, sys.stderr
    with (
        contextlib.redirect_stdout(_ThreadTee(sink, out)),
        contextlib.redirect_stderr(_ThreadTee(sink, err)),
    ):
        yield
