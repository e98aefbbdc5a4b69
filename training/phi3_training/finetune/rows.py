"""Conversations as rows to train on: reading, casual copies, tokens and the audit before training.

Reads JSON lines of `{"messages": […]}`; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import StageError
from ..prompt import ChatFormat, Example
from .audit import Report, Row, Seen, audit, expected_labels

Conversation = list[dict[str, str]]
Located = tuple[str, Conversation]  # where it stands, and its messages


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

    Raises StageError when one cannot be written as tokens, and when there is none.
    """
    encoded = []
    for place, messages in rows:
        try:
            encoded.append(Row(place, messages, chat.encode_example(messages)))
        except ValueError as error:
            raise StageError(f"{place}: {error}") from None
    if not encoded:
        raise StageError("There is nothing to train on: the chats hold no conversation.")
    return encoded


def audited(
    chat: ChatFormat, rows: Sequence[Row], limit: int, allow: Collection[str] | None = ()
) -> tuple[list[Row], Report]:
    """The rows as they are trained on, and their audit.

    Raises StageError for a breach of a rule that is not allowed (None: no rule can be). Rows longer
    than `limit` are cut where that is allowed; rows that teach nothing are left out likewise.
    """
    given = [_cut(row, limit) for row in rows]
    seen = [Seen(row.example.input_ids, expected_labels(row.example)) for row in given]
    report = audit(rows, seen, chat)
    report.refuse(allow)
    kept = [row for row in given if any(row.example.assistant_mask)]
    if not kept:
        raise StageError("There is nothing to train on: no row has a token to learn.")
    return kept, report


def _cut(row: Row, limit: int) -> Row:
    """The row's first `limit` tokens: what a trainer can be given of it."""
    ids, mask = row.example.input_ids, row.example.assistant_mask
    if len(ids) <= limit:
        return row
    return replace(row, example=Example(ids[:limit], mask[:limit]), is_cut=True)


def _key(row: Conversation) -> str:
    return json.dumps([[message["role"], message["content"]] for message in row])
