"""The label audit of packed rows: is each conversation there, whole, masked as before and alone?

Compares packed rows as a trainer has them with what each conversation should teach.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..prompt import ChatFormat
from .audit import IGNORED, Finding, Report, Row, Seen, audit


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
            found.append((same.pop(), piece))
    report = audit([row for row, _ in found], [piece for _, piece in found], chat)
    report.rows = len(rows)
    report.findings += _lost([row for left in waiting.values() for row in left], packed)
    report.findings += _count(rows, packed)
    return report


def _lost(rows: Sequence[Row], packed: Sequence[SeenPacked]) -> Iterator[Finding]:
    """Conversations that do not stand alone: run into others, or torn apart."""
    texts = [_text(bin_.input_ids) for bin_ in packed]
    for row in rows:
        text = _text(row.example.input_ids)
        holders = [number for number, whole in enumerate(texts, start=1) if text in whole]
        if holders:
            detail = f"in packed row {holders[0]} without a border to its neighbours"
            yield Finding("packed-sight", row.place, detail)
        else:
            yield Finding("cut-answer", row.place, "in no packed row as a whole")


def _count(rows: Sequence[Row], packed: Sequence[SeenPacked]) -> Iterator[Finding]:
    before = sum(sum(row.example.assistant_mask) for row in rows)
    after = sum(label != IGNORED for bin_ in packed for label in bin_.labels)
    if before != after:
        detail = f"{before} tokens to learn before packing, {after} after it"
        yield Finding("packed-mask", "all rows together", detail)


def _text(ids: Sequence[int]) -> str:
    """Ids as characters: to search them with the speed of text."""
    return "".join(map(chr, ids))
