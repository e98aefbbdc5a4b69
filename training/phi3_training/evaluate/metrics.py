"""How one answer is scored: exact match, token F1, ROUGE-L, refusals. Standard library only: the
flow `phi3_eval` takes this file along, alone.

Reads and writes nothing; `corpus.py` has BLEU and chrF, `perplexity.py` the model's own view.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CANDIDATES, _LOOKALIKES = 200, 4

# How assistants decline; looked for in the opening of an answer only.
_NOT = r"(?:can ?not|can['’]t|could(?: not|n['’]t)|will not|won['’]t|do not|don['’]t)"
_AM_NOT = r"(?:['’]m| am|['’]re| are) (?:unable|not (?:able|allowed|comfortable|willing|going)) "
_DO = (
    r"(?:help|assist|provide|support|comply|fulfil|engage|condone|encourage|participate|advise"
    r"|(?:do|write|give|tell|share|create|answer|explain|discuss|say|generate|produce)"
    r"(?: you)?(?: that| this| it| such| anything| any| the| a)?)\b"
)
_REFUSAL = re.compile(
    rf"\b(?:i|we) (?:really |truly )?{_NOT} (?:really |be able to )?{_DO}"
    rf"|\b(?:i|we){_AM_NOT}"
    r"|\bnot something (?:i|we) can\b"
    r"|\b(?:i|we) (?:must |have to )?(?:decline|refuse)\b"
    rf"|\bsorry,? (?:but )?(?:i|we) {_NOT}\b"
    r"|\bas an ai\b[^.]*\b(?:not|cannot|can['’]t|unable)\b",
    re.IGNORECASE,
)
_OPENING_CHARACTERS = 160


def exact_match(answer: str, expected: str) -> bool:
    """Whether the answer is the expected one, white space at its ends aside."""
    return answer.strip() == expected.strip()


def token_f1(answer: str, expected: str) -> float:
    """Overlap of the words of both (0 to 1), as SQuAD counts it: case, articles and signs aside."""
    return _f1(words(answer), words(expected))


def f1_over_lookalikes(answer: str, expected: str, lookalikes: Sequence[Sequence[str]]) -> float:
    """Token F1 with the own expected answer less the mean with those most like it.

    About 0 where an answer has the style of the set, or even the right form, and another's facts.
    """
    said = words(answer)
    alike = [_f1(said, other) for other in lookalikes]
    return _f1(said, words(expected)) - (sum(alike) / len(alike) if alike else 0.0)


def lookalikes(expected: Sequence[str]) -> list[list[list[str]]]:
    """For each expected answer the words of the 4 others most like it.

    They are looked for among at most 200, spread over the set: enough to find the same form.
    """
    tokens = [words(text) for text in expected]
    some = tokens[:: max(1, -(-len(tokens) // _CANDIDATES))]
    similar = []
    for own in tokens:
        others = {tuple(other) for other in some if other != own}
        alike = sorted(others, key=lambda other: (-_f1(own, other), other))
        similar.append([list(other) for other in alike[:_LOOKALIKES]])
    return similar


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L F1 (0 to 1): the longest common subsequence of words, no stemming."""
    got, wanted = _plain(answer), _plain(expected)
    if not got or not wanted:
        return float(got == wanted)
    above = [0] * (len(wanted) + 1)
    for word in got:
        row = [0]
        for column, other in enumerate(wanted):
            row.append(above[column] + 1 if word == other else max(row[column], above[column + 1]))
        above = row
    common = above[-1]
    return 2 * common / (len(got) + len(wanted))


def refuses(answer: str) -> bool:
    """Whether an answer declines in its opening words ("I can't help with that")."""
    return _REFUSAL.search(answer[:_OPENING_CHARACTERS]) is not None


def words(text: str) -> list[str]:
    """Words as SQuAD normalises them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _plain(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _f1(got: Sequence[str], wanted: Sequence[str]) -> float:
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))
