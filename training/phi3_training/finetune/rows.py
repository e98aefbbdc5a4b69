"""Conversations as rows to train on: reading, copies in other words, tokens and the audit before.

Reads JSON lines of `{"messages": […]}`; writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import StageError
from ..prompt import ChatFormat, Example
from .audit import Report, Row, Seen, audit, expected_labels

Conversation = list[dict[str, str]]
Located = tuple[str, Conversation]  # its place (file:line), and its messages


def read_rows(paths: Iterable[Path]) -> list[Conversation]:
    """The conversations of prepared files, in order."""
    rows = []
    for path in paths:
        with path.open(encoding="utf-8") as stream:
            rows += [json.loads(line)["messages"] for line in stream if line.strip()]
    return rows


def casual_copy(conversation: Conversation) -> Conversation | None:
    """The conversation with its last question as people type it in a hurry.

    Lower case, no question mark or full stop at the end; None when that changes nothing.
    """
    last = max(i for i, message in enumerate(conversation) if message["role"] == "user")
    question = conversation[last]["content"]
    casual = question.lower().rstrip("?. ")
    if not casual or casual == question:
        return None
    copy = [dict(message) for message in conversation]
    copy[last]["content"] = casual
    return copy


def with_casual_copies(rows: Sequence[Located]) -> list[Located]:
    """The rows and their casual copies; what is already there is not added twice."""
    seen = {_key(row) for _, row in rows}
    copies = []
    for place, row in rows:
        copy = casual_copy(row)
        if copy is not None and _key(copy) not in seen:
            seen.add(_key(copy))
            copies.append((f"{place} (casual copy)", copy))
    return [*rows, *copies]


def read_located(path: Path, root: Path) -> Iterator[Located]:
    """The conversations of a prepared file, each with its place: `data/train.jsonl:12`."""
    shown = path.relative_to(root)
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{shown}:{number}", json.loads(line)["messages"]


def encode_rows(chat: ChatFormat, rows: Iterable[Located]) -> list[Row]:
    """Located conversations as token ids with their masks.

    Raises StageError if one cannot be encoded as tokens, or if there is none.
    """
    encoded = []
    for place, messages in rows:
        try:
            encoded.append(Row(place, messages, chat.encode_example(messages)))
        except ValueError as error:
            raise StageError(f"{place}: {error}") from None
    if not encoded:
        raise StageError("There is nothing to train on: the chats contain no conversation.")
    return encoded


def audited(
    chat: ChatFormat, rows: Sequence[Row], limit: int, allow: Collection[str] | None = ()
) -> tuple[list[Row], Report]:
    """The rows as they are trained on, and their audit.

    Raises StageError for a breach of a rule that is not allowed (None: no rule can be). Rows longer
    than `limit` are cut where that is allowed; rows that teach nothing are left out likewise.
    """
    given, report = audit_rows(chat, rows, limit)
    report.refuse(allow)
    learnable = [row for row in given if any(row.example.assistant_mask)]
    if not learnable:
        raise StageError("There is nothing to train on: no row has a token to learn.")
    return learnable, report


def audit_rows(chat: ChatFormat, rows: Sequence[Row], limit: int) -> tuple[list[Row], Report]:
    """The rows as a trainer would be given them, at most `limit` tokens each, and their audit."""
    given = [_cut(row, limit) for row in rows]
    seen = [Seen(row.example.input_ids, expected_labels(row.example)) for row in given]
    return given, audit(rows, seen, chat)


def _cut(row: Row, limit: int) -> Row:
    """The row's first `limit` tokens: what a trainer can be given of it."""
    ids, mask = row.example.input_ids, row.example.assistant_mask
    if len(ids) <= limit:
        return row
    return replace(row, example=Example(ids[:limit], mask[:limit]), is_cut=True)


def _key(row: Conversation) -> str:
    return json.dumps([[turn["role"], turn["content"], turn.get("weight", 1)] for turn in row])


# The same question in other words: copies of a chat that teach the answer and not one phrasing.
# A small model that has seen one wording of each question learns wordings by heart; asked otherwise
# it gives another question's answer. The copies need no other model: greetings, lower case, words
# left out, keywords. Reads and writes nothing.

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
