"""The label audit: before the first step, is exactly each answer learnt, whole and with its end?

Compares the rows as a trainer has them with what each conversation should teach. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import StageError
from ..prompt import ChatFormat, Example
from .audit_rules import RULES
from .system_turn import SystemTurn

IGNORED = -100
_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """A conversation, where it stands (`data/train.jsonl:12`), and what it should teach."""

    place: str
    messages: Sequence[dict[str, str]]
    example: Example
    is_cut: bool = False  # knowingly, because that was allowed


@dataclass(frozen=True)
class Seen:
    """A row as a trainer has it: its tokens, and what is learnt of them (-100: nothing)."""

    input_ids: Sequence[int]
    labels: Sequence[int]


@dataclass(frozen=True)
class Finding:
    """One row that breaks a rule."""

    rule: str
    place: str
    detail: str


@dataclass
class Report:
    """What an audit found; `shares` are the trained tokens of each row, 0 to 1."""

    rows: int
    shares: list[float] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

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
        stopped = "The label audit stopped the training before its first step."
        paragraphs = [stopped, *(self._paragraph(rule) for rule in faults)]
        if allow is not None:
            flags = " ".join(f"--allow {rule}" for rule in faults)
            paragraphs.append(f"To train all the same (it is recorded in the run): {flags}")
        raise StageError("\n\n".join(paragraphs))

    def choices(self) -> list[str]:
        """What a user should see of it: what was let pass."""
        found = ", ".join(f"{count} × {rule}" for rule, count in self.counts().items())
        return [f"label audit: {found}; trained all the same, as --allow says"] if found else []

    def manifest(self, allow: Collection[str]) -> dict[str, Any]:
        """For the run: the shares of trained tokens, and what was found and allowed."""
        shares = sorted(self.shares) or [0.0]
        return {
            "rows": self.rows,
            "trained_share": {
                "least": round(shares[0], 4),
                "median": round(shares[len(shares) // 2], 4),
                "most": round(shares[-1], 4),
            },
            "allow": sorted(allow),
            "allowed_findings": self.counts(),
        }

    def _paragraph(self, rule: str) -> str:
        found = [finding for finding in self.findings if finding.rule == rule]
        lines = [f"{rule} ({len(found)} of {self.rows} rows): {RULES[rule].what}"]
        lines += [f"  {finding.place}: {finding.detail}" for finding in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"  … and {len(found) - _SHOWN} more")
        return "\n".join([*lines, f"  Mend: {RULES[rule].mend}"])


def expected_labels(example: Example) -> list[int]:
    """The labels that teach exactly the marked tokens."""
    pairs = zip(example.input_ids, example.assistant_mask, strict=True)
    return [token if learnt else IGNORED for token, learnt in pairs]


def audit(rows: Sequence[Row], seen: Sequence[Seen], chat: ChatFormat) -> Report:
    """Compare each row with how the trainer has it; both in the same order."""
    auditor = _Auditor(chat)
    report = Report(len(rows))
    for row, given in zip(rows, seen, strict=True):
        trained = sum(label != IGNORED for label in given.labels)
        report.shares.append(trained / max(1, len(given.labels)))
        report.findings += [
            Finding(rule, _named(row), detail) for rule, detail in auditor.findings(row, given)
        ]
    return report


class _Auditor:
    """The rules for one row."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._stops = frozenset(chat.stop_token_ids)
        self._system = SystemTurn.of(chat)

    def findings(self, row: Row, given: Seen) -> Iterator[tuple[str, str]]:
        wanted = row.example.input_ids
        yield from self._system_turn(row, given)
        if list(given.input_ids) == wanted and list(given.labels) == expected_labels(row.example):
            yield from self._mask_of_the_format(row)
            return
        start = _found_in(given.input_ids, wanted)
        if start is None:
            yield from self._other_tokens(row, given)
        else:
            yield from self._cut(row, given, start)
            mask = row.example.assistant_mask[start : start + len(given.input_ids)]
            yield from self._labels(given, mask)

    def _mask_of_the_format(self, row: Row) -> Iterator[tuple[str, str]]:
        """The tokens are as the chat format says; what if the format itself is wrong?"""
        mask = row.example.assistant_mask
        if not any(mask):
            yield "nothing-trained", f"none of {len(mask)} tokens"
        elif all(mask):
            yield "everything-trained", f"all of {len(mask)} tokens"
        if not row.is_cut:
            yield from self._ends(row, [i for i, learnt in enumerate(mask) if learnt])

    def _ends(self, row: Row, trained: Sequence[int]) -> Iterator[tuple[str, str]]:
        answers = sum(message["role"] == "assistant" for message in row.messages)
        ids = row.example.input_ids
        ends = sum(ids[i] in self._stops for i in trained)
        if trained and ends < answers:
            yield "no-end", f"{answers} answers, {ends} ends to learn"

    def _system_turn(self, row: Row, given: Seen) -> Iterator[tuple[str, str]]:
        if any(m["role"] == "system" and m["content"].strip() for m in row.messages):
            return
        content = self._system.content(given.input_ids) if self._system else None
        if content is not None:
            rule = "added-system" if content.strip() else "empty-system"
            yield rule, repr(content[:40])

    def _other_tokens(self, row: Row, given: Seen) -> Iterator[tuple[str, str]]:
        ids, wanted = given.input_ids, row.example.input_ids
        at = next(
            (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b),
            min(len(ids), len(wanted)),
        )
        has, serves = self._shown(ids[at : at + 4]), self._shown(wanted[at : at + 4])
        yield "other-tokens", f"from token {at + 1} on {has}; a served prompt has {serves}"
        if all(label == IGNORED for label in given.labels):
            yield "nothing-trained", f"none of {len(given.labels)} tokens"
        elif all(label != IGNORED for label in given.labels):
            yield "everything-trained", f"all of {len(given.labels)} tokens"
        elif not any(label in self._stops for label in given.labels):
            yield "no-end", "no end of a turn among the learnt tokens"

    def _cut(self, row: Row, given: Seen, start: int) -> Iterator[tuple[str, str]]:
        mask = row.example.assistant_mask
        lost = sum(mask) - sum(mask[start : start + len(given.input_ids)])
        if lost:
            yield "cut-answer", f"{lost} of {sum(mask)} answer tokens are cut off"
        elif len(given.input_ids) < len(mask):
            yield "cut-answer", f"{len(mask) - len(given.input_ids)} tokens are cut off"

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
            yield "everything-trained", f"{sum(learnt)} of {len(ids)} tokens, questions too"
        elif extra:
            yield "question-trained", f"{len(extra)} tokens outside the answers"
        yield from self._missing(ids, [i for i, on in enumerate(learnt) if mask[i] and not on])

    def _missing(self, ids: Sequence[int], missing: Sequence[int]) -> Iterator[tuple[str, str]]:
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


def _found_in(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """Where `part` stands in `whole`, as its beginning or its end; None when it is neither."""
    size, part = len(part), list(part)
    if size == 0 or size > len(whole):
        return None
    if whole[:size] == part:
        return 0
    return len(whole) - size if whole[-size:] == part else None


def _named(row: Row) -> str:
    asked = next((m["content"] for m in row.messages if m["role"] == "user"), "")
    return f"{row.place} ({asked[:40]!r}{'…' if len(asked) > 40 else ''})"
