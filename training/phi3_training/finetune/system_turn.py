"""Finds a system turn at the start of a row of tokens, in the words of any chat template.

Reads a chat format only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TypeVar

from ..prompt import ChatFormat

T = TypeVar("T")


class SystemTurn:
    """The tokens that open a system turn in one model's chat format."""

    def __init__(self, chat: ChatFormat, opening: Sequence[int]) -> None:
        self._chat = chat
        self._opening = list(opening)
        self._stops = frozenset(chat.stop_token_ids)

    @classmethod
    def of(cls, chat: ChatFormat) -> SystemTurn | None:
        """None for a template that has no system turns."""
        texts = [[_system(word), _user("x")] for word in ("A", "7")]
        plain = [[_user(word)] for word in ("A", "7")]
        try:
            opening = _common([chat.encode_prompt(text) for text in texts])
            written = _common([chat.render(text, add_generation_prompt=True) for text in texts])
        except ValueError:  # the template refuses system messages
            return None
        user = _common([chat.encode_prompt(text) for text in plain])
        # Templates that put the system text into the user's turn, or in front of it unmarked.
        if opening == user or "sys" not in "".join(written).lower():
            return None
        while (
            opening and not chat.is_control(opening[-1]) and not chat.decode(opening[-1:]).strip()
        ):
            opening.pop()  # the mark of a word's start belongs to the content
        return cls(chat, opening)

    def content(self, ids: Sequence[int]) -> str | None:
        """The text of the row's system turn; None when it has none."""
        row = list(ids)
        # One token of leeway: a beginning of text that somebody added.
        for start in (0, 1):
            end = start + len(self._opening)
            if row[start:end] == self._opening:
                inside = takewhile(lambda token: token not in self._stops, row[end:])
                return self._chat.decode(list(inside))
        return None


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _common(rows: Sequence[Sequence[T]]) -> list[T]:
    """The elements with which all rows begin."""
    first, *others = rows
    size = 0
    while size < min(map(len, rows)) and all(row[size] == first[size] for row in others):
        size += 1
    return list(first[:size])
