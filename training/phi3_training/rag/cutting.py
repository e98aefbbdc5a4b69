"""Sections to passages: pieces of a document that fit the embedder and a small model's context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import MissingExtraError
from .documents import Section

#: Tokens of a passage with its heading. MiniLM reads 256, two of them its own; the rest is for
#: tokens that cutting at a word's end adds. Four passages leave a 4k model room for a history.
PASSAGE_TOKENS = 240
# The end of it: the last heading says most about the passage.
_HEADING_CHARACTERS = 120
# semchunk looks at a whole text at once: a line of 50 MB would take minutes and gigabytes.
_BLOCK_CHARACTERS = 100_000


@dataclass(frozen=True)
class Passage:
    """What is searched and shown; `first` and `last` are offsets in the document's text."""

    text: str
    heading: str
    page: int | None
    first: int
    last: int

    @property
    def searched(self) -> str:
        """What the embedder reads: the heading says what the text is about."""
        return f"{self.heading}: {self.text}" if self.heading else self.text


class Cutter:
    """Cuts sections at paragraphs, sentences and words, in that order.

    `count` gives the tokens of a text. Raises MissingExtraError without semchunk.
    """

    def __init__(self, count: Callable[[str], int], tokens: int = PASSAGE_TOKENS) -> None:
        try:
            from semchunk.semchunk import chunkerify
        except ImportError:
            raise MissingExtraError("semchunk", "local") from None
        self._count, self._tokens = count, tokens
        self._chunkerify = chunkerify
        self._chunkers: dict[int, Any] = {}

    def passages(self, section: Section) -> Iterator[Passage]:
        """The passages of a section, in order; white space at their ends is left out."""
        heading = " | ".join(section.heading)
        if len(heading) > _HEADING_CHARACTERS:
            heading = "…" + heading[-_HEADING_CHARACTERS:]
        # In steps, so that the few headings of a document share their chunkers.
        room = self._tokens - -(-self._count(heading) // 16) * 16 if heading else self._tokens
        # A heading may not take more than half of what the embedder reads.
        room = max(room, self._tokens // 2)
        for start, block in _blocks(section.text):
            if room not in self._chunkers:
                # memoize=False: it would hold every text of every document.
                self._chunkers[room] = self._chunkerify(self._count, room, memoize=False)
            _, offsets = self._chunkers[room](block, offsets=True)
            for first, last in offsets:
                text = block[first:last]
                stripped = text.strip()
                if stripped:
                    begin = section.start + start + first + len(text) - len(text.lstrip())
                    yield Passage(stripped, heading, section.page, begin, begin + len(stripped))


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    start = 0
    while len(text) - start > _BLOCK_CHARACTERS:
        end = max(
            text.rfind(border, start + _BLOCK_CHARACTERS // 2, start + _BLOCK_CHARACTERS)
            for border in ("\n\n", "\n", " ")
        )
        end = end if end > 0 else start + _BLOCK_CHARACTERS
        yield start, text[start:end]
        start = end
    yield start, text[start:]
