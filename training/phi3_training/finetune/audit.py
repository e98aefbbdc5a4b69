"""The label audit: before the first step, is exactly each answer trained on, with its end?

Compares the rows as a trainer has them with what each conversation should teach. Writes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import NamedTuple, TypeVar, get_args

from ..errors import StageError, shortened
from ..manifests import LabelAudit, TrainedShare
from ..prompt import ChatFormat, Example
from ..recipe import AuditRule

# What each rule of the label audit means, and what fixes a breach. Names: recipe.AuditRule.


class Rule(NamedTuple):
    """What would go wrong, and the way out."""

    what: str
    fix: str


_TEMPLATE = "Use the model's original chat_template.jinja and tokenizer.json."
_LABELS = (
    "Give the trainer the labels of the chat format unchanged (no collator that makes its own)."
)

RULES: dict[str, Rule] = {
    "nothing-trained": Rule(
        "not one token would be learnt: the whole row is masked.",
        f"Make sure that each conversation has an answer by the assistant. {_LABELS}",
    ),
    "everything-trained": Rule(
        "the questions would be learnt like the answers: nothing is masked.",
        f"{_LABELS} {_TEMPLATE}",
    ),
    "cut-answer": Rule(
        "the row is too long and would be truncated, so an answer or its end is lost and the "
        "model does not learn when to stop.",
        "Raise data.max_length as far as the model's context allows (for base.data: "
        "base.max_position_embeddings), or shorten the conversation.",
    ),
    "no-end": Rule(
        "the token that ends an answer (Phi-3's <|end|>) would not be learnt, so the tuned model "
        "would never stop.",
        f"{_TEMPLATE} {_LABELS}",
    ),
    "pad-is-end": Rule(
        "the padding token is also an end of text, and masking the padding masked the end.",
        "Mask by position, not by token id, or give the tokenizer a separate pad token "
        "(tokenizer_config.json: pad_token).",
    ),
    "answer-untrained": Rule(
        "a part of an answer would not be learnt.",
        "Find answers by token position, not by text: the same text is tokenized differently in "
        "other contexts. "
        f"{_LABELS}",
    ),
    "question-trained": Rule(
        "tokens outside the assistant's answers would be learnt.",
        _LABELS,
    ),
    "shifted-labels": Rule(
        "labels are at the wrong position, so the wrong tokens would be learnt.",
        f"The model shifts labels itself. {_LABELS}",
    ),
    "other-tokens": Rule(
        "the tokens differ from those of the same conversation when served (an extra or missing "
        "beginning-of-text token, line feed or template part).",
        _TEMPLATE,
    ),
    "empty-system": Rule(
        "the row has an empty system turn, which a served prompt without system text does not "
        "have.",
        f"Remove empty system messages. {_TEMPLATE}",
    ),
    "added-system": Rule(
        "the row has a system turn that is not in the data: the chat template added it.",
        f"Write the system message into the data, or remove it from the template. {_TEMPLATE}",
    ),
    "packed-mask": Rule(
        "packing changed how many tokens are learnt: the mask was lost.",
        "Use finetune.packing, which keeps it, or set finetune.packing=false.",
    ),
    "packed-sight": Rule(
        "conversations packed into one row would attend to each other: positions do not restart.",
        "Use finetune.packing, which separates them, or set finetune.packing=false.",
    ),
}

assert tuple(RULES) == get_args(AuditRule)  # noqa: S101 - two lists of the same names


# Finds a system turn at the start of a row of tokens, in the words of any chat template.
# Reads a chat format only.

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
        # One token of leeway: an added beginning-of-text token.
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


IGNORED = -100  # the label that torch's cross_entropy leaves out (its ignore_index)
_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """A conversation, its place (`data/train.jsonl:12`), and what it should teach."""

    place: str
    messages: Sequence[dict[str, str]]
    example: Example
    is_cut: bool = False  # knowingly, because that was allowed


@dataclass(frozen=True)
class Seen:
    """A row as a trainer has it: its tokens, and its labels (-100: not trained on)."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Finding:
    """One row that breaks a rule."""

    rule: str
    place: str
    detail: str
    row: int | None = None  # its number among the audited rows


@dataclass
class Report:
    """What an audit found; `shares` are the trained tokens of each row, 0 to 1."""

    rows: int
    shares: list[float] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    answers_as_context: int = 0  # of weight 0 in the chats: read, and not learnt

    def counts(self) -> dict[str, int]:
        """How many findings each broken rule has."""
        broken = [finding.rule for finding in self.findings]
        return {rule: broken.count(rule) for rule in RULES if rule in broken}

    def refuse(self, allow: Collection[str] | None) -> None:
        """Raise StageError, a paragraph for each broken rule that is not allowed.

        None: nothing can be allowed here, so no way around is offered.
        """
        faults = [rule for rule in self.counts() if rule not in (allow or ())]
        if not faults:
            return
        paragraphs = ["The label audit stopped the training before its first step."]
        for rule in faults:
            broken = [f for f in self.findings if f.rule == rule]
            places = shortened([f"{f.place}: {f.detail}" for f in broken], _SHOWN)
            paragraphs.append(
                f"{rule} ({len(broken)} of {self.rows} rows): {RULES[rule].what}\n"
                + "".join(f"  {line}\n" for line in places)
                + f"  Fix: {RULES[rule].fix}"
            )
        if allow is not None:
            flags = " ".join(f"--allow {rule}" for rule in faults)
            paragraphs.append(f"To train anyway (recorded in the run): {flags}")
        raise StageError("\n\n".join(paragraphs))

    def choices(self) -> list[str]:
        """What a user should see of it: what was let pass."""
        counted = ", ".join(f"{count} × {rule}" for rule, count in self.counts().items())
        how = "trained anyway (--allow, or data.too_long=cut)"
        lines = [f"label audit: {counted}; {how}"] if counted else []
        if count := self.answers_as_context:
            what = "1 answer is" if count == 1 else f"{count} answers are"
            lines.append(f"label audit: {what} context and not learnt (weight 0 in the chats)")
        return lines

    def manifest(self, allow: Collection[str]) -> LabelAudit:
        """For the run: the shares of trained tokens, and what was found and allowed."""
        shares = sorted(self.shares) or [0.0]
        return LabelAudit(
            rows=self.rows,
            trained_share=TrainedShare(
                least=round(shares[0], 4),
                median=round(shares[len(shares) // 2], 4),
                most=round(shares[-1], 4),
            ),
            answers_as_context=self.answers_as_context,
            allow=sorted(allow),
            allowed_findings=self.counts(),
        )


def expected_labels(example: Example) -> list[int]:
    """The labels that teach exactly the marked tokens."""
    pairs = zip(example.input_ids, example.assistant_mask, strict=True)
    return [token if learnt else IGNORED for token, learnt in pairs]


def audit(rows: Sequence[Row], seen: Sequence[Seen], chat: ChatFormat) -> Report:
    """Compare each row with how the trainer has it; both in the same order."""
    auditor = _Auditor(chat)
    report = Report(len(rows))
    report.answers_as_context = sum(not m.get("weight", 1) for row in rows for m in row.messages)
    for number, (row, given) in enumerate(zip(rows, seen, strict=True)):
        trained = sum(label != IGNORED for label in given.labels)
        report.shares.append(trained / max(1, len(given.labels)))
        asked = next((m["content"] for m in row.messages if m["role"] == "user"), "")
        named = f"{row.place} ({asked[:40]!r}{'…' if len(asked) > 40 else ''})"
        report.findings += [
            Finding(rule, named, detail, number) for rule, detail in auditor.findings(row, given)
        ]
    return report


class _Auditor:
    """The rules for one row."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._stops = frozenset(chat.stop_token_ids)
        self._system = SystemTurn.of(chat)

    def findings(self, row: Row, given: Seen) -> Iterator[tuple[str, str]]:
        """Each broken rule with its detail."""
        ids, wanted, mask = given.input_ids, row.example.input_ids, row.example.assistant_mask
        # A system turn that nobody wrote: the template's own, or an empty one.
        if not any(m["role"] == "system" and m["content"].strip() for m in row.messages):
            content = self._system.content(ids) if self._system else None
            if content is not None:
                yield "added-system" if content.strip() else "empty-system", repr(content[:40])
        if list(ids) == wanted and list(given.labels) == expected_labels(row.example):
            # The tokens are as the chat format says; what if the format itself is wrong?
            if not any(mask):
                yield "nothing-trained", f"none of {len(mask)} tokens"
            elif all(mask):
                yield "everything-trained", f"all of {len(mask)} tokens"
            answers = [m for m in row.messages if m["role"] == "assistant"]
            learnt = sum(m.get("weight", 1) != 0 for m in answers)
            ends = sum(t in self._stops for t, on in zip(wanted, mask, strict=True) if on)
            if any(mask) and ends < learnt and not row.is_cut:
                yield "no-end", f"{learnt} answers, {ends} ends to learn"
            return
        # What libraries do to long rows: they keep the beginning, or the end.
        size = len(ids)
        if size and wanted[:size] == list(ids):
            start = 0
        elif size and wanted[-size:] == list(ids):
            start = len(wanted) - size
        else:  # other tokens: a template or a tokenizer has changed them
            at = next(
                (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b),
                min(size, len(wanted)),
            )
            has, serves = self._shown(ids[at : at + 4]), self._shown(wanted[at : at + 4])
            yield "other-tokens", f"from token {at + 1} on {has}; a served prompt has {serves}"
            if all(label == IGNORED for label in given.labels):
                yield "nothing-trained", f"none of {len(given.labels)} tokens"
            elif IGNORED not in given.labels:
                yield "everything-trained", f"all of {len(given.labels)} tokens"
            elif not any(label in self._stops for label in given.labels):
                yield "no-end", "no end of turn among the learnt tokens"
            return
        kept = mask[start : start + size]
        if lost := sum(mask) - sum(kept):
            yield "cut-answer", f"{lost} of {sum(mask)} answer tokens are cut off"
        elif size < len(mask):
            yield "cut-answer", f"{len(mask) - size} tokens are cut off"
        yield from self._labels(given, kept)

    def _labels(self, given: Seen, mask: Sequence[int]) -> Iterator[tuple[str, str]]:
        """The row's tokens are right; are its labels?"""
        ids, labels = given.input_ids, given.labels
        learnt = [label != IGNORED for label in labels]
        shifted = sum(on and label != i for on, label, i in zip(learnt, labels, ids, strict=True))
        if shifted:
            yield "shifted-labels", f"{shifted} labels are not the row's own tokens"
        if not any(learnt):
            yield "nothing-trained", f"none of {len(ids)} tokens"
            return
        extra = [i for i, on in enumerate(learnt) if on and not mask[i]]
        if extra and len(extra) == len(mask) - sum(mask):
            yield "everything-trained", f"{sum(learnt)} of {len(ids)} tokens, including questions"
        elif extra:
            yield "question-trained", f"{len(extra)} tokens outside the answers"
        missing = [i for i, on in enumerate(learnt) if mask[i] and not on]
        padding = [i for i in missing if ids[i] == self._chat.pad_token_id]
        ends = [i for i in missing if ids[i] in self._stops and i not in padding]
        rest = len(missing) - len(padding) - len(ends)
        if padding:
            yield "pad-is-end", f"{self._shown([ids[padding[0]]])} ends the text and is masked"
        if ends:
            yield "no-end", f"{len(ends)} ends of turns ({self._shown([ids[ends[0]]])}) are masked"
        if rest:
            yield "answer-untrained", f"{rest} tokens of its answers are masked"

    def _shown(self, ids: Sequence[int]) -> str:
        return f"{list(ids)} ({self._chat.decode(ids)!r})" if len(ids) else "nothing"


# The label audit of packed rows: is each conversation complete, masked as before and separate?
# Compares packed rows as a trainer has them with what each conversation should teach.


@dataclass(frozen=True)
class SeenPacked:
    """A packed row as a trainer has it; a conversation begins where its position is 0."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    positions: Sequence[int]

    def pieces(self) -> Iterator[Seen]:
        """What the attention keeps apart."""
        starts = [i for i, position in enumerate(self.positions) if position == 0]
        for start, end in pairwise([*starts, len(self.positions)]):
            yield Seen(self.input_ids[start:end], self.labels[start:end])


def audit_packed(rows: Sequence[Row], packed: Sequence[SeenPacked], chat: ChatFormat) -> Report:
    """Audit packed rows; they may hold the conversations in any order."""
    waiting: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in rows:
        waiting[tuple(row.example.input_ids)].append(row)
    found: list[tuple[Row, Seen]] = []
    for piece in (piece for bin_ in packed for piece in bin_.pieces()):
        if same := waiting.get(tuple(piece.input_ids)):
            # The same conversation may be there twice, with different answers to learn.
            fits = [expected_labels(row.example) == list(piece.labels) for row in same]
            found.append((same.pop(fits.index(True) if any(fits) else -1), piece))
    report = audit([row for row, _ in found], [piece for _, piece in found], chat)
    report.rows = len(rows)
    # Conversations that are not separate: merged with others, or split.
    texts = [_text(bin_.input_ids) for bin_ in packed]
    for row in (row for left in waiting.values() for row in left):
        text = _text(row.example.input_ids)
        holders = [number for number, whole in enumerate(texts, start=1) if text in whole]
        if holders:
            detail = f"in packed row {holders[0]} without a boundary to its neighbours"
            report.findings.append(Finding("packed-sight", row.place, detail))
        else:
            detail = "not complete in any packed row"
            report.findings.append(Finding("cut-answer", row.place, detail))
    before = sum(sum(row.example.assistant_mask) for row in rows)
    after = sum(label != IGNORED for bin_ in packed for label in bin_.labels)
    if before != after:
        detail = f"{before} tokens to learn before packing, {after} after it"
        report.findings.append(Finding("packed-mask", "all rows together", detail))
    return report


def _text(ids: Sequence[int]) -> str:
    """Ids as characters: to search them with the speed of text."""
    return "".join(map(chr, ids))
