"""A conversation as the exact text that is trained on, cut where trained and other tokens meet.

Reads a model folder's tokenizer through ChatFormat; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UsageError
from ..prompt import ChatFormat
from .conversation import Conversation


@dataclass(frozen=True)
class Stretch:
    """Tokens that follow on each other and are all trained on, or all not."""

    trained: bool
    text: str


@dataclass(frozen=True)
class TokenView:
    """What the model sees of one conversation."""

    place: str
    ids: list[int]
    mask: list[int]
    stretches: list[Stretch]

    @property
    def trained(self) -> int:
        """How many tokens are learnt."""
        return sum(self.mask)

    def as_dict(self) -> dict[str, Any]:
        """For `-o json`."""
        return {
            "place": self.place,
            "tokens": len(self.ids),
            "trained": self.trained,
            "input_ids": self.ids,
            "assistant_mask": self.mask,
            "stretches": [{"trained": s.trained, "text": s.text} for s in self.stretches],
        }


class TokenViewer:
    """Shows conversations as one model folder writes them. Raises UsageError for other folders."""

    def __init__(self, folder: Path) -> None:
        try:
            self._chat = ChatFormat.from_folder(folder)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def view(self, conversation: Conversation) -> TokenView:
        """The conversation as the trainer is given it, before it is cut to `max_length`.

        Raises UsageError for a conversation that the model's template cannot write.
        """
        place = f"{conversation.source.name}:{conversation.line}"
        messages = [message.to_dict() for message in conversation.messages]
        try:
            example = self._chat.encode_example(messages)
        except ValueError as error:
            raise UsageError(f"{place}: {error}") from None
        ids, mask = example.input_ids, example.assistant_mask
        return TokenView(place, ids, mask, self._stretches(ids, mask))

    def _stretches(self, ids: list[int], mask: list[int]) -> list[Stretch]:
        """Each stretch's text is what it adds to the text before it: so spaces are right."""
        stretches: list[Stretch] = []
        end, before = 0, ""
        for trained, run in groupby(mask):
            end += len(list(run))
            text = str(self._tokenizer.decode(ids[:end], skip_special_tokens=False))
            stretches.append(Stretch(bool(trained), text[len(before) :]))
            before = text
        return stretches
