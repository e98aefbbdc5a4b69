"""How long work reports its progress: callers pass a function that shows it."""

from __future__ import annotations

from collections.abc import Callable

# progress(done, total, text): total 0 means "how much is not known".
Progress = Callable[[int, int, str], None]


def no_progress(_done: int, _total: int, _text: str) -> None:
    """Shows nothing: for callers without a display."""


def note(progress: Progress, text: str) -> None:
    """Report work of unknown length."""
    progress(0, 0, text)
