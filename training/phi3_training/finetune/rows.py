"""Conversations as rows to train on: reading, rewordings, tokens, limits and the label audit.

Reads JSON lines of `{"messages": […]}`; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data import faults
from ..data.faults import Problem
from ..data.findings import too_many
from ..errors import StageError, UsageError
from ..prompt import ChatFormat, Example
from ..recipe import DataSection, Recipe
from ..run import Run
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
    given = []
    for row in rows:
        ids, mask = row.example.input_ids, row.example.assistant_mask
        if len(ids) > limit:
            row = replace(row, example=Example(ids[:limit], mask[:limit]), is_cut=True)
        given.append(row)
    seen = [Seen(row.example.input_ids, expected_labels(row.example)) for row in given]
    return given, audit(rows, seen, chat)


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
            # The row, and what is made of it for the training, which may be longer.
            copies: list[Located] = [("", conversation)]
            if part == "train":
                copies = with_casual_copies(copies) if self._data.casual_copies else copies
                copies = with_rewordings(copies, self._data.rewordings, self._data.seed)
            for place, copy in copies:
                try:
                    rows.append(Row(place, copy, self._chat.encode_example(copy)))
                except ValueError as error:
                    why = str(error).rstrip(".")
                    problems.setdefault(number, faults.UNWRITABLE(why=why))
                    continue
                whose.append(number)
        for finding in audit_rows(self._chat, rows, self.limit)[1].findings if rows else []:
            if finding.row is None or finding.rule in self._allow:
                continue
            row, rule = rows[finding.row], finding.rule
            size = len(row.example.input_ids)
            if size <= self.limit:
                what = f"{RULES[rule].what.rstrip('.')} ({finding.detail})"
                fix = f"{RULES[rule].fix.rstrip('.')}; to train anyway: --allow {rule}"
                problem = Problem(rule, what, fix)
            else:
                of_model = self.limit < self._data.max_length
                problem = faults.TOO_LONG(
                    size=size,
                    copy=row.place,
                    name="the model's context length" if of_model else "data.max_length",
                    limit=self.limit,
                    more="" if of_model else "raise data.max_length, ",
                )
            problems.setdefault(whose[finding.row], problem)
        yield from sorted(problems.items())


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


# What the recipe itself lets pass with data.too_long=cut; a row without a token to learn is left
# out by `audited`.
_CUT = ("cut-answer", "nothing-trained")


@dataclass(frozen=True)
class TrainingRows:
    """All rows of a training: those that are learnt, and those whose loss is watched meanwhile.

    `counts` are the conversations by where they are from, `skipped` says what the recipe left out,
    `limit` is in tokens, and `allow` names the audit's rules that may be broken.
    """

    train: list[Row]
    held_out: list[Row]
    limit: int
    allow: list[str]
    report: Report
    counts: dict[str, int]
    skipped: list[str]

    @classmethod
    def of(cls, recipe: Recipe, run: Run, chat: ChatFormat) -> TrainingRows:
        """Read a run's prepared chats, with the copies that the recipe asks for.

        Raises StageError when they cannot be learnt from as they are.
        """
        data, folder = recipe.data, run.path / "data"
        train = list(read_located(folder / "train.jsonl", run.path))
        casual = with_casual_copies(train) if data.casual_copies else train
        reworded = with_rewordings(casual, data.rewordings, data.seed)
        replay: list[Located] = []
        if (folder / "replay.jsonl").is_file():
            replay = list(read_located(folder / "replay.jsonl", run.path))
        limit = min(data.max_length, chat.context_length)
        allow = [*recipe.finetune.allow, *(_CUT if data.too_long == "cut" else ())]
        rows, skipped = trainable(chat, [*reworded, *replay], limit, data)
        rows, report = audited(chat, rows, limit, allow)
        held_out: list[Row] = []
        if recipe.finetune.eval_steps is not None:
            located = list(read_located(folder / "validation.jsonl", run.path))
            held_out, _ = audited(chat, trainable(chat, located, limit, data)[0], limit, allow)
        counts = {
            "train": len(train),
            "casual_copies": len(casual) - len(train),
            "rewordings": len(reworded) - len(casual),
            "replay": len(replay),
        }
        return cls(rows, held_out, limit, allow, report, counts, skipped)
