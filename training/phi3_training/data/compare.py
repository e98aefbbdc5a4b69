"""Finds conversations that were met before: twice in one set, or trained on and held out."""

from __future__ import annotations

from pathlib import Path

from .conversation import Conversation
from .faults import Problem, shown

Place = tuple[Path, int]


class Seen:
    """The conversations met so far, 16 bytes and a place for each."""

    def __init__(self) -> None:
        self._places: dict[bytes, Place] = {}

    def repeated(self, conversation: Conversation) -> Problem | None:
        """The problem if exactly these messages were met before; remembers them otherwise."""
        place = (conversation.source, conversation.line)
        first = self._places.setdefault(conversation.identity(), place)
        if first is place:
            return None
        return Problem(
            "duplicate", f"the same conversation as {_shown(first)}", "keep one of the two"
        )


class Trained:
    """The questions that are trained on, each in its context, to hold held-out rows against."""

    def __init__(self) -> None:
        self._places: dict[bytes, Place] = {}

    def add(self, key: bytes, conversation: Conversation) -> None:
        """Remember a trained conversation by its `question_key()`."""
        self._places.setdefault(key, (conversation.source, conversation.line))

    def leaked(self, conversation: Conversation) -> Problem | None:
        """The problem of a held-out conversation whose question is trained on."""
        place = self._places.get(conversation.question_key())
        if place is None:
            return None
        return Problem(
            "leak",
            f"held out, but {_shown(place)} trains on the same question in the same context",
            "take it out of one of the two sets: a figure on trained questions tells nothing",
        )


def _shown(place: Place) -> str:
    path, line = place
    return f"{shown(path)}:{line}"
