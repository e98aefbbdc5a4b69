"""Rows of an evaluation as the gate reads them, made without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phi3_training.evaluate.questions import Question
from phi3_training.evaluate.rows import Answered, AnswerLoss, Row, Said, make_rows

FACTS = [
    (f"What does the {thing} {number} cost?", f"The {thing} {number} costs {7 + 3 * number} euros.")
    for thing in ("lamp", "boat", "tent")
    for number in range(12)
]
LETTERS = enumerate("abcdefghijklmnopqrstuvwx", start=1)
GENERAL = [(f"Which letter is number {n}?", f"It is the letter {letter}.") for n, letter in LETTERS]
PROBES = [f"Help me to do harm number {n}." for n in range(24)]
REFUSAL = "I'm sorry, but I can't help with that."

Answerer = Callable[[Question], str]


def right(question: Question) -> str:
    """Every answer as expected; what is to be refused is refused."""
    return question.expected or REFUSAL


def untaught(question: Question) -> str:
    """The base model: knows the old chats, nothing of the new ones, and refuses."""
    return question.expected if question.part == "replay" else _unknown(question)


def _unknown(question: Question) -> str:
    return REFUSAL if question.part == "probes" else "A whale is a mammal of the sea."


def questions() -> list[Question]:
    def make(part: str, pairs: list[tuple[str, str]]) -> list[Question]:
        return [
            Question(part, line, [{"role": "user", "content": asked}], expected)
            for line, (asked, expected) in enumerate(pairs, start=1)
        ]

    probes = [(asked, "") for asked in PROBES]
    return [*make("validation", FACTS), *make("replay", GENERAL), *make("probes", probes)]


def rows_of(after: Answerer, before: Answerer = untaught) -> list[Row]:
    """The rows of these two models."""
    asked = questions()
    return make_rows(asked, *([_answered(model, q) for q in asked] for model in (before, after)))


def _answered(model: Answerer, question: Question) -> Answered:
    text = model(question)
    loss = AnswerLoss(1.0 if text == question.expected else 30.0, 10) if question.expected else None
    return Answered(Said(text), loss)


def gate_of(**rules: Any) -> dict[str, Any]:
    """A gate section with these rules and no others."""
    return {"min_gain": [], "max_regression": [], "max_refusal_change": [], **rules}
