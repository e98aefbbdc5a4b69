"""Conversations as rows to train on: reading, casual copies, tokens and the checks before training.

Reads JSON lines of `{"messages": […]}`; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import StageError
from ..prompt import ChatFormat, Example

Conversation = list[dict[str, str]]

_NAMED_ROWS = 5


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


def with_casual_copies(rows: Sequence[Conversation]) -> list[Conversation]:
    """The rows and their casual copies; what is already there is not added twice."""
    seen = {_key(row) for row in rows}
    copies = []
    for row in rows:
        copy = casual_copy(row)
        if copy is not None and _key(copy) not in seen:
            seen.add(_key(copy))
            copies.append(copy)
    return [*rows, *copies]


def encode_rows(
    chat: ChatFormat, rows: Sequence[Conversation], max_length: int, source: str
) -> list[Example]:
    """The rows as token ids with their masks, checked.

    Raises StageError when a row cannot be written as tokens, is longer than `max_length` (its
    answer would be cut), teaches nothing, or when every token of every row is learnt.
    """
    if not rows:
        raise StageError(f"There is nothing to train on: {source} holds no conversation.")
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(chat.encode_example(row))
        except ValueError as error:
            raise StageError(f"{source}, conversation {number}: {error}") from None
    _check_lengths(examples, rows, max_length, source)
    _check_masks(examples, rows, source)
    return examples


def _check_lengths(
    examples: Sequence[Example], rows: Sequence[Conversation], max_length: int, source: str
) -> None:
    long = [i for i, example in enumerate(examples) if len(example.input_ids) > max_length]
    if long:
        longest = max(len(examples[i].input_ids) for i in long)
        raise StageError(
            f"{source}: {len(long)} of {len(rows)} conversations are longer than {max_length} "
            f"tokens (the longest has {longest}), so the end of their answers would be cut off "
            f"and never learnt: {_named(long, rows)}. Raise data.max_length as far as the model's "
            "context allows, or shorten them."
        )


def _check_masks(examples: Sequence[Example], rows: Sequence[Conversation], source: str) -> None:
    empty = [i for i, example in enumerate(examples) if not any(example.assistant_mask)]
    if empty:
        raise StageError(
            f"{source}: {len(empty)} of {len(rows)} conversations have no token to learn: "
            f"{_named(empty, rows)}. Expected an answer by the assistant in each."
        )
    if all(all(example.assistant_mask) for example in examples):
        raise StageError(
            f"{source}: every token of every conversation would be learnt, questions too; the "
            "chat template of the model does not separate answers from questions. "
            "Use the model's original chat template."
        )


def _named(numbers: Sequence[int], rows: Sequence[Conversation]) -> str:
    shown = [f"conversation {i + 1} ({rows[i][0]['content'][:40]!r}…)" for i in numbers]
    more = len(shown) - _NAMED_ROWS
    return ", ".join(shown[:_NAMED_ROWS]) + (f" and {more} more" if more > 0 else "")


def _key(row: Conversation) -> str:
    return json.dumps([[message["role"], message["content"]] for message in row])
