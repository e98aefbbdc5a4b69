"""Conversations as rows to train on: reading, rewordings, tokens, limits and the label audit.

Reads JSON lines of `{"messages": […]}`; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..data import faults
from ..data.faults import Problem
from ..data.findings import too_many
from ..errors import StageError, UsageError
from ..prompt import ChatFormat, Example
from ..recipe import DataSection, Recipe
from .audit import RULES, Report, Row, Seen, audit, expected_labels
from .rewordings import Conversation, Located, with_casual_copies, with_rewordings


def read_rows(paths: Iterable[Path]) -> list[Conversation]:
    """The conversations of prepared files, in order."""
    rows = []
    for path in paths:
        with path.open(encoding="utf-8") as stream:
            rows += [json.loads(line)["messages"] for line in stream if line.strip()]
    return rows


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


# The label audit's rules that chats and tokenizer decide alone, asked before a base is loaded.
# `TokenRules` is what `phi3 data check RECIPE` and `prepare` ask; `trainable` applies
# `data.too_long` and `data.bad_rows` to what only the training can see (a base made in the run).


class TokenRules:
    """What the label audit of a recipe's training would say of its chats."""

    def __init__(
        self,
        chat: ChatFormat,
        data: DataSection,
        *,
        allow: Collection[str] = (),
        parts: Collection[str] = ("train", "replay"),
    ) -> None:
        self._chat = chat
        self._data = data
        self._allow = frozenset(allow)
        self.parts: Collection[str] = frozenset(parts)
        self.limit = min(data.max_length, chat.context_length)

    @classmethod
    def of(cls, recipe: Recipe, folder: Path) -> TokenRules:
        """The rules of a recipe with the tokenizer of a model folder.

        Raises UsageError for a folder without a fast tokenizer or a chat template.
        """
        # Held-out chats are audited where the training looks at their loss.
        parts = {"train", "replay", *(["validation"] if recipe.finetune.eval_steps else [])}
        return cls(chat_of(folder), recipe.data, allow=recipe.finetune.allow, parts=parts)

    def broken(
        self, part: str, conversations: Sequence[Conversation]
    ) -> Iterator[tuple[int, Problem]]:
        """The numbers of the conversations that the audit would stop, and why; each once."""
        rows: list[Row] = []
        whose: list[int] = []
        problems: dict[int, Problem] = {}
        for number, conversation in enumerate(conversations):
            for place, copy in self._copies(part, conversation):
                try:
                    rows.append(Row(place, copy, self._chat.encode_example(copy)))
                except ValueError as error:
                    why = str(error).rstrip(".")
                    problems.setdefault(number, faults.UNWRITABLE(why=why))
                    continue
                whose.append(number)
        for finding in audit_rows(self._chat, rows, self.limit)[1].findings if rows else []:
            if finding.row is not None and finding.rule not in self._allow:
                row = rows[finding.row]
                problem = self._problem(finding.rule, finding.detail, row)
                problems.setdefault(whose[finding.row], problem)
        yield from sorted(problems.items())

    def _copies(self, part: str, conversation: Conversation) -> list[Located]:
        """The row and what is made of it for the training, which may be longer."""
        rows: list[Located] = [("", conversation)]
        if part != "train":
            return rows
        rows = with_casual_copies(rows) if self._data.casual_copies else rows
        return with_rewordings(rows, self._data.rewordings, self._data.seed)

    def _problem(self, rule: str, detail: str, row: Row) -> Problem:
        size = len(row.example.input_ids)
        if size <= self.limit:
            means = RULES[rule]
            fix = f"{means.fix.rstrip('.')}; to train anyway: --allow {rule}"
            return Problem(rule, f"{means.what.rstrip('.')} ({detail})", fix)
        is_context = self.limit < self._data.max_length
        name = "the model's context length" if is_context else "data.max_length"
        more = "" if is_context else "raise data.max_length, "
        return faults.TOO_LONG(size=size, copy=row.place, name=name, limit=self.limit, more=more)


def chat_of(folder: Path) -> ChatFormat:
    """The chat format of a model folder; UsageError where it has none."""
    try:
        return ChatFormat.from_folder(folder)
    except ValueError as error:
        raise UsageError(str(error)) from None


def trainable(
    chat: ChatFormat, located: Sequence[Located], limit: int, data: DataSection
) -> tuple[list[Row], list[str]]:
    """The rows to train on without those that the recipe skips, and what was skipped.

    Raises StageError where a row cannot be encoded, or where more than `data.max_skipped` of the
    rows would be skipped.
    """
    rows: list[Row] = []
    bad: list[str] = []
    for place, messages in located:
        try:
            rows.append(Row(place, messages, chat.encode_example(messages)))
        except ValueError as error:
            if data.bad_rows != "skip":
                raise StageError(f"{place}: {error}") from None
            bad.append(f"{place}: {error}")
    long = [row for row in rows if len(row.example.input_ids) > limit]
    if data.too_long == "skip":
        rows = [row for row in rows if len(row.example.input_ids) <= limit]
    skipped = len(bad) + (len(long) if data.too_long == "skip" else 0)
    if reason := too_many(skipped, len(located), data.max_skipped):
        places = [row.place for row in long[:5]] or bad[:5]
        raise StageError(f"{reason}. The first: {', '.join(places)}")
    if not rows:
        raise StageError("There is nothing to train on: the chats contain no conversation.")
    remarks = [f"skipped: {len(bad)} rows that cannot be encoded (data.bad_rows)"] if bad else []
    if long and data.too_long != "refuse":
        done = "skipped" if data.too_long == "skip" else "cut"
        remarks.append(f"{done}: {len(long)} rows of more than {limit} tokens (data.too_long)")
    return rows, remarks
