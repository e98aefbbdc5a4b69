"""One row for each question: the expected answer, both models' answers, and their scores.

The rows are run/evaluate/rows.jsonl: written once, read by the gate and the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypedDict, cast

from phi3_tool.grounding import question_in

from ..errors import StageError
from ..finetune.rewordings import Conversation
from ..run import Run, write_atomically
from ..telling import Set, contains, has_expected_words
from . import corpus
from .metrics import (
    exact_match,
    f1_over_lookalikes,
    lookalikes,
    refuses,
    rouge_l,
    token_f1,
    words,
)
from .questions import PARTS, Question

PATH = "evaluate/rows.jsonl"
Side = Literal["before", "after"]  # the base model, the tuned one
Scores = dict[str, float]  # by the name of the metric; true and false are numbers as well


class Row(TypedDict):
    """One line of run/evaluate/rows.jsonl; `*_right` is None where no one answer is right."""

    part: str
    line: int  # of the prepared file
    origin: str  # file and line of the user's own file, where they are known
    question: str
    earlier_turns: Conversation
    expected: str
    accept: list[str]
    telling: list[str]  # words and numbers of the expected answer that no other one has
    before: str
    after: str
    before_right: bool | None
    after_right: bool | None
    before_scores: Scores
    after_scores: Scores


def scores_of(row: Row, side: Side) -> Scores:
    """The scores of one model's answer."""
    return row["before_scores"] if side == "before" else row["after_scores"]


def is_right(row: Row, side: Side) -> bool | None:
    """Whether one model's answer is right."""
    return row["before_right"] if side == "before" else row["after_right"]


@dataclass(frozen=True)
class Said:
    """An answer; `cut` where it reached its limit before the model ended it."""

    text: str
    cut: bool = False


@dataclass(frozen=True)
class AnswerLoss:
    """Sum of the negative log likelihoods (natural logarithm) and how many tokens they are of."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class Answered:
    """One model's answer to a question (None: no room in its context), and its loss."""

    said: Said | None
    loss: AnswerLoss | None


def make_rows(
    questions: Sequence[Question], before: Sequence[Answered], after: Sequence[Answered]
) -> list[Row]:
    """The rows, in the order of the questions."""
    alike: dict[int, list[list[str]]] = {}
    for part in PARTS:
        chosen = [i for i, q in enumerate(questions) if q.part == part and q.expected]
        similar = lookalikes([questions[i].expected for i in chosen])
        alike.update(zip(chosen, similar, strict=True))
    sets = answer_sets(questions)
    rows: list[Row] = []
    for i, question in enumerate(questions):
        among = sets[question.part]
        was, now = (_scores(question, a, alike.get(i, []), among) for a in (before[i], after[i]))
        # Right is what has the expected words; where none are expected, no answer is wrong.
        right_was, right_now = (
            bool(scores["contains"]) if "contains" in scores else None for scores in (was, now)
        )
        rows.append(
            {
                "part": question.part,
                "line": question.line,
                "origin": question.origin,
                "question": question.prompt[-1]["content"],
                "earlier_turns": question.prompt[:-1],
                "expected": question.expected,
                "accept": list(question.accept),
                "telling": list(among.telling(question.expected, asked_in(question.prompt)).all),
                "before": _text(before[i]),
                "after": _text(after[i]),
                "before_right": right_was,
                "after_right": right_now,
                "before_scores": was,
                "after_scores": now,
            }
        )
    return rows


def answer_sets(questions: Sequence[Question]) -> dict[str, Set]:
    """For each part what its expected answers share; held-out and trained chats are one set."""
    sets = {}
    for parts in (("validation", "train"), *((part,) for part in PARTS)):
        chosen = [q for q in questions if q.part in parts and q.expected]
        answers = Set.of(
            [q.expected for q in chosen], [question_in(q.prompt[-1]["content"]) for q in chosen]
        )
        sets.update({part: answers for part in parts if part not in sets})
    return sets


def asked_in(prompt: Sequence[Mapping[str, str]]) -> str:
    """All text before an answer: repeating it adds no information.

    Passages of documents are left out: to find the answer in them is what is asked.
    """
    return "\n".join(question_in(turn["content"]) for turn in prompt)


def write_rows(run: Run, rows: Sequence[Row]) -> None:
    """Write run/evaluate/rows.jsonl."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(run.path / PATH, text)


def read_rows(run: Run) -> list[Row]:
    """Read them back. Raises StageError when they are not there, or of an older version."""
    path = run.path / PATH
    try:
        # Not splitlines(), which also cuts at U+2028 inside of a text.
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = cast(list[Row], [json.loads(line) for line in lines if line])
    except (OSError, ValueError):
        rows = []
    if not rows or any(not row.keys() >= Row.__required_keys__ for row in rows):
        raise StageError(
            f"{path} is missing or was not written by this version; create it with: phi3 up "
            f"--again evaluate"
        )
    return rows


def _text(answered: Answered) -> str:
    return answered.said.text if answered.said is not None else ""


def _scores(
    question: Question, answered: Answered, alike: Sequence[Sequence[str]], among: Set
) -> Scores:
    """Every metric of one answer that needs no other answers than the look-alikes."""
    text, expected = _text(answered), question.expected
    scores: Scores = {}
    # What the chats themselves accept counts; else what tells this answer from all others.
    if question.accept:
        scores["contains"] = contains(text, question.accept)
    elif expected:
        scores["contains"] = has_expected_words(text, expected, asked_in(question.prompt), among)
    if expected:
        scores |= {
            "exact_match": exact_match(text, expected),
            "token_f1": round(token_f1(text, expected), 4),
            "f1_over_lookalikes": round(f1_over_lookalikes(text, expected, alike), 4),
            "rouge_l": round(rouge_l(text, expected), 4),
            "bleu": round(corpus.of_one("bleu", text, expected), 2),
            "chrf": round(corpus.of_one("chrf", text, expected), 2),
        }
    if answered.loss is not None:
        scores |= {"nll": answered.loss.nll, "tokens": answered.loss.tokens}
    return {
        **scores,
        "words": len(words(text)),
        "cut": answered.said is None or answered.said.cut,
        "refusal_rate": refuses(text),
    }


# The base model's answers, cached so that a second tuning of the same base reuses them.
# Reads and writes run/evaluate/base-answers.json, atomically, and only for exactly the
# same weights, questions and settings.

BASE_ANSWERS = "evaluate/base-answers.json"


def remembered(run: Run, key: str | None) -> list[Answered] | None:
    """The answers cached under `key`; None if there are none."""
    if key is None:
        return None
    try:
        cached = json.loads((run.path / BASE_ANSWERS).read_text(encoding="utf-8"))
        if cached["key"] != key:
            return None
        return [
            Answered(
                Said(**answer["said"]) if answer["said"] is not None else None,
                AnswerLoss(**answer["loss"]) if answer["loss"] is not None else None,
            )
            for answer in cached["answers"]
        ]
    except (OSError, ValueError, TypeError, KeyError):  # nothing, or of another version
        return None


def remember(run: Run, key: str | None, answers: Sequence[Answered]) -> None:
    """Cache the answers under `key`, replacing earlier ones."""
    if key is not None:
        content = {"key": key, "answers": [asdict(answer) for answer in answers]}
        write_atomically(run.path / BASE_ANSWERS, json.dumps(content, ensure_ascii=False))
