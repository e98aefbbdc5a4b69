"""`phi3 rag evaluate`: how well the index finds what your own questions ask for; no model is asked.

Reads questions (JSON lines) and the index. A passage is right when it lies where the question says
(`source`, and `page` or `heading` where given), else when it holds the expected answer.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_tool.grounding import MIN_SCORE, MIN_WORDS_SCORE
from phi3_tool.index import Embedder, Hit, PassageIndex

from ..errors import UsageError

DEPTHS = (1, 3, 5, 10)
_KEYS = frozenset(("question", "answer", "source", "page", "heading", "answerable"))


@dataclass(frozen=True)
class Question:
    """A question with what makes a passage right; `answerable` False: nothing should be found."""

    line: int
    text: str
    answer: str
    source: str | None
    page: int | None
    heading: str | None
    answerable: bool

    def is_answered_by(self, hit: Hit) -> bool:
        """Whether the passage is a right one."""
        if self.source is None:
            return _plain(self.answer) in _plain(hit.text)
        return (
            hit.source == self.source
            and self.page in (None, hit.page)
            and (self.heading is None or self.heading in hit.heading)
        )


@dataclass(frozen=True)
class Retrieval:
    """Figures over the answerable questions, and what `min_score` does to both kinds.

    `hits[k]` is the share of questions with a right passage among the first k; `mrr` and `ndcg`
    look at the first ten. Seconds are for one question with its vector.
    """

    questions: int
    unanswerable: int
    hits: dict[int, float]
    mrr: float
    ndcg: float
    lost: float
    refused: float | None
    min_score: float
    median_seconds: float
    worst: tuple[tuple[int, str, str], ...]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Raises UsageError with every fault and its line."""
    questions: list[Question] = []
    faults: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); expected UTF-8 JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(_question(number, json.loads(line)))
        except ValueError as error:
            what = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            faults.append(f"  {path.name}:{number}: {what}")
    if faults:
        raise UsageError(
            f"{path} has {len(faults)} faults:\n" + "\n".join(faults) + "\nExpected rows like "
            '{"question": "…", "answer": "…", "source": "tents.md"}, or {"question": "…", '
            '"answerable": false}'
        )
    if not questions:
        raise UsageError(f"{path} has no questions")
    return questions


def _question(line: int, row: Any) -> Question:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise ValueError("no text under `question`")  # noqa: TRY004 - one kind of error per row
    unknown = sorted(row.keys() - _KEYS)
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}; known: {', '.join(sorted(_KEYS))}")
    answerable = row.get("answerable", True)
    if answerable and not (row.get("source") or str(row.get("answer") or "").strip()):
        raise ValueError("neither `source` nor `answer` says what would be right")
    return Question(
        line, row["question"], str(row.get("answer") or ""), row.get("source"), row.get("page"),
        row.get("heading"), bool(answerable),
    )  # fmt: skip


def measure(
    index: PassageIndex, embedder: Embedder | None, questions: Sequence[Question]
) -> Retrieval:
    """Look every question up and count. Raises UsageError where a `source` is not indexed."""
    answerable = [question for question in questions if question.answerable]
    unanswerable = [question for question in questions if not question.answerable]
    if not answerable:
        raise UsageError("Every question is unanswerable: there is nothing to find")
    least = MIN_WORDS_SCORE if embedder is None else MIN_SCORE
    ranks: list[list[bool]] = []
    best: list[float] = []
    seconds: list[float] = []
    worst: list[tuple[int, str, str]] = []
    for question in answerable:
        started = time.perf_counter()
        hits = index.search(question.text, top_k=max(DEPTHS), embedder=embedder)
        seconds.append(time.perf_counter() - started)
        right = [question.is_answered_by(hit) for hit in hits]
        ranks.append(right)
        best.append(hits[0].score if hits else 0.0)
        if not any(right[:1]):
            worst.append((question.line, question.text, hits[0].place if hits else "nothing"))
    none = [
        hits[0].score if hits else 0.0
        for question in unanswerable
        for hits in [index.search(question.text, top_k=1, embedder=embedder)]
    ]
    count = len(answerable)
    return Retrieval(
        questions=count,
        unanswerable=len(unanswerable),
        hits={depth: sum(any(right[:depth]) for right in ranks) / count for depth in DEPTHS},
        mrr=sum(_reciprocal(right) for right in ranks) / count,
        ndcg=sum(_ndcg(right) for right in ranks) / count,
        lost=sum(score < least for score in best) / count,
        refused=sum(score < least for score in none) / len(none) if none else None,
        min_score=least,
        median_seconds=statistics.median(seconds),
        worst=tuple(worst),
    )


def _reciprocal(right: Sequence[bool]) -> float:
    return 1 / (right.index(True) + 1) if True in right else 0.0


def _ndcg(right: Sequence[bool]) -> float:
    """Normalized discounted cumulative gain of relevance 0 or 1 (Järvelin & Kekäläinen, 2002).

    The best possible order is that of the right passages among the ten that were found.
    """
    gains = [1 / math.log2(place + 2) for place in range(len(right))]
    ideal = sum(gains[: sum(right)])
    return sum(gain for gain, is_right in zip(gains, right, strict=True) if is_right) / (ideal or 1)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
