"""What goes wrong with the rehearsal itself; `python -m phi3_rehearsal` prints it as one line."""

from __future__ import annotations


class RehearsalError(Exception):
    """The rehearsal could not do what was asked; exit status 1."""


class UsageError(RehearsalError):
    """What was asked cannot be read, or nothing runs that could do it; exit status 2."""
