"""BLEU and chrF of a whole set, by sacrebleu, from sums that can be resampled.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError

Name = Literal["bleu", "chrf"]
Numbers = NDArray[np.float64]


def statistics(name: Name, answers: Sequence[str], expected: Sequence[str]) -> Numbers:
    """One row of counts for each answer; the score of a set needs their sums only."""
    # sacrebleu's own bootstrap works with this method as well; setup.py bounds the version for it.
    counts = _metric(name)._extract_corpus_statistics(list(answers), [list(expected)])
    return np.array(counts, dtype=np.float64)


def score(name: Name, sums: Numbers) -> Numbers:
    """The score (0 to 100) for each row of summed counts, as sacrebleu gives it for that set."""
    metric = _metric(name)
    whole = sums.round().astype(int).tolist()
    return np.array([metric._compute_score_from_stats(row).score for row in whole])


def of_one(name: Name, answer: str, expected: str) -> float:
    """The score of a single answer: sentence BLEU leaves out orders that a short text lacks."""
    return float(_metric(name, single=True).sentence_score(answer, [expected]).score)


@cache
def _metric(name: Name, *, single: bool = False) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "sacrebleu", "local") from None
    return BLEU(effective_order=single) if name == "bleu" else CHRF()
