"""The same question in other words: copies of a chat that teach the answer and not one phrasing.

A small model that has seen one wording of each question learns wordings by heart; asked otherwise
it gives another question's answer. The copies need no other model: greetings, lower case, words
left out, keywords. Reads and writes nothing.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence

Conversation = list[dict[str, str]]
Located = tuple[str, Conversation]

_GREETINGS = ("Hi, ", "Hello, ", "Hey, ", "Excuse me, ", "Quick question: ", "Morning! ")
_REQUESTS = ("Can you tell me: ", "Please tell me: ", "I'd like to know: ", "Do you know: ")
_ENDINGS = (" please", " thanks", " thank you", " pls", " cheers")
_SMALL_WORDS = frozenset(
    re.findall(
        r"\S+",
        """a an the is are was do does did can could would will i i'd i'm you your my me it of to
        for and or in on at with that this there have has be please tell""",
    )
)
_WORD = re.compile(r"\S+")
_DROPPED = 0.2  # of a question's words, where some are left out at random


def with_rewordings(rows: Sequence[Located], count: int, seed: int) -> list[Located]:
    """The rows and up to `count` rewordings of each; none twice, the same for the same seed."""
    seen = {_key(row) for _, row in rows}
    copies = []
    for place, row in rows:
        for number, copy in enumerate(_rewordings(row, count, seed), start=1):
            if _key(copy) not in seen:
                seen.add(_key(copy))
                copies.append((f"{place} (reworded, {number})", copy))
    return [*rows, *copies]


def _rewordings(row: Conversation, count: int, seed: int) -> list[Conversation]:
    """Copies whose last question is put otherwise, a different way each."""
    last = max(i for i, message in enumerate(row) if message["role"] == "user")
    question = row[last]["content"]
    digest = hashlib.sha256(f"{seed}\n{question}".encode()).digest()
    chance = random.Random(digest)  # noqa: S311 - chooses wordings, guards nothing
    ways = list(_WAYS)
    chance.shuffle(ways)
    copies = []
    for way in ways * -(-count // len(ways)):
        text = way(question, chance).strip()
        if text and text != question:
            copy = [dict(message) for message in row]
            copy[last]["content"] = text
            copies.append(copy)
        if len(copies) == count:
            break
    return copies


def _casual(question: str, _chance: random.Random) -> str:
    return question.lower().rstrip("?. ")


def _greeted(question: str, chance: random.Random) -> str:
    return chance.choice(_GREETINGS) + _inside(question)


def _requested(question: str, chance: random.Random) -> str:
    return chance.choice(_REQUESTS) + _inside(question)


def _ended(question: str, chance: random.Random) -> str:
    return question.rstrip("?. ") + chance.choice(_ENDINGS)


def _keywords(question: str, _chance: random.Random) -> str:
    """The words that say what is asked: as people type into a search box."""
    words = [word for word in _WORD.findall(question) if word.lower() not in _SMALL_WORDS]
    return " ".join(words).rstrip("?. ") if len(words) > 1 else question


def _shortened(question: str, chance: random.Random) -> str:
    words = question.split()
    left = [word for word in words if chance.random() > _DROPPED]
    return " ".join(left) if len(left) > 2 else question


def _inside(question: str) -> str:
    """The question as the second part of a sentence; names and "I" keep their capital."""
    first = question.split(" ", 1)[0]
    keeps = first in ("I", "I'd", "I'm", "I've") or not first[1:].islower()
    return question if keeps else question[0].lower() + question[1:]


_WAYS: tuple[Callable[[str, random.Random], str], ...] = (
    _casual,
    _greeted,
    _requested,
    _ended,
    _keywords,
    _shortened,
)


def _key(row: Conversation) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in row)
