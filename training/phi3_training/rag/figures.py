"""`phi3 rag evaluate`: how well the index finds what your own questions ask for; no model is asked.

Reads questions and the index. A passage is right when it lies where the question says (`source`,
and `page` or `heading` where given), else when it holds the expected answer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from phi3_tool.grounding import MIN_SCORE, MIN_WORDS_SCORE
from phi3_tool.index import Embedder, PassageIndex

from ..errors import UsageError
from .questions import Question

DEPTHS = (1, 3, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """Figures over the answerable questions, and what `min_score` does to both kinds.

    `hits[k]` is the share of questions with a right passage among the first k, `kinds` the same
    for each kind of question, `recall[k]` the mean share of a question's right passages there;
    `mrr` and `ndcg` look at the first ten. Seconds are for one question with its vector.
    """

    questions: int
    unanswerable: int
    hits: dict[int, float]
    kinds: dict[str, dict[int, float]]
    recall: dict[int, float]
    mrr: float
    ndcg: float
    lost: float
    refused: float | None
    min_score: float
    median_seconds: float
    worst: tuple[tuple[int, str, str], ...]


def measure(
    index: PassageIndex,
    embedder: Embedder | None,
    questions: Sequence[Question],
    right_ids: Sequence[Collection[int]],
) -> Retrieval:
    """Look every question up and count.

    `right_ids` are the ids of the right passages of each question (`right_ids_of`). Raises
    UsageError where every question is unanswerable.
    """
    answerable = [question for question in questions if question.answerable]
    unanswerable = [question for question in questions if not question.answerable]
    if not answerable:
        raise UsageError("Every question is unanswerable: there is nothing to find")
    # The flow's own limits, so that `lost` and `refused` are what its users would see.
    least = MIN_WORDS_SCORE if embedder is None else MIN_SCORE
    wanted = [ids for q, ids in zip(questions, right_ids, strict=True) if q.answerable]
    ranks: list[list[bool]] = []
    best: list[float] = []
    seconds: list[float] = []
    worst: list[tuple[int, str, str]] = []
    for question, ids in zip(answerable, wanted, strict=True):
        # With the vector of the question, which is most of a question's time.
        started = time.perf_counter()
        # Once, as deep as any figure looks; each figure takes the front of it.
        hits = index.search(question.text, top_k=max(DEPTHS), embedder=embedder)
        seconds.append(time.perf_counter() - started)
        right = [hit.id in ids for hit in hits]
        ranks.append(right)
        best.append(hits[0].score if hits else 0.0)
        # Worst means that another passage comes first, wherever the right one is.
        if not any(right[:1]):
            worst.append((question.line, question.text, hits[0].place if hits else "nothing"))
    none = [
        hits[0].score if hits else 0.0
        for question in unanswerable
        for hits in [index.search(question.text, top_k=1, embedder=embedder)]
    ]
    kinds: dict[str, list[list[bool]]] = {}
    for question, right in zip(answerable, ranks, strict=True):
        kinds.setdefault(question.kind, []).append(right)
    count = len(answerable)
    return Retrieval(
        questions=count,
        unanswerable=len(unanswerable),
        hits=_shares(ranks),
        kinds={kind: _shares(of_kind) for kind, of_kind in kinds.items()} if any(kinds) else {},
        recall={
            depth: sum(
                sum(right[:depth]) / max(1, len(ids))
                for right, ids in zip(ranks, wanted, strict=True)
            )
            / count
            for depth in DEPTHS
        },
        mrr=sum(1 / (right.index(True) + 1) for right in ranks if any(right)) / count,
        ndcg=sum(_ndcg(right) for right in ranks) / count,
        lost=sum(score < least for score in best) / count,
        refused=sum(score < least for score in none) / len(none) if none else None,
        min_score=least,
        median_seconds=statistics.median(seconds),
        worst=tuple(worst),
    )


def _shares(ranks: Sequence[Sequence[bool]]) -> dict[int, float]:
    return {k: sum(any(right[:k]) for right in ranks) / len(ranks) for k in DEPTHS}


def _ndcg(right: Sequence[bool]) -> float:
    """Normalized discounted cumulative gain of relevance 0 or 1 (Järvelin & Kekäläinen, 2002).

    The best possible order is that of the right passages among the ten that were found.
    """
    gains = [1 / math.log2(place + 2) for place in range(len(right))]
    ideal = sum(gains[: sum(right)])
    return sum(gain for gain, is_right in zip(gains, right, strict=True) if is_right) / (ideal or 1)
