"""How an answer is scored: strict exact match and token F1. Standard library only."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one, white space at its ends aside."""
    return answer.strip() == expected.strip()


def token_f1(answer: str, expected: str) -> float:
    """Overlap of the words of both (0 to 1), as SQuAD counts it: case, articles and signs aside."""
    got, wanted = _words(answer), _words(expected)
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(got), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def score(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float | int]:
    """The figures of one set of questions; `rows` is how many there were."""
    pairs = list(zip(answers, expected, strict=True))
    correct = sum(exact_match(answer, wanted) for answer, wanted in pairs)
    f1 = sum(token_f1(answer, wanted) for answer, wanted in pairs)
    count = len(pairs)
    return {
        "rows": count,
        "correct": correct,
        "exact_match": correct / count if count else 0.0,
        "token_f1": round(f1 / count, 4) if count else 0.0,
    }


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
