"""Before and after: the same questions to the base and to the tuned model.

Reads run/data/*.jsonl, the base model and run/model; writes run/evaluate/rows.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StageError
from ..finetune import Progress
from ..finetune.rows import Conversation, read_rows
from ..finetune.runtime import choose_runtime, quiet_libraries, torch_threads
from ..finetune.weights import base_folder, count_weights
from ..recipe import Recipe
from ..run import Run, write_atomically
from .generate import answers
from .metrics import exact_match, score

# What is asked, in the order of the report: never trained on, trained on, known before.
PARTS = ("validation", "train", "replay")


@dataclass(frozen=True)
class Question:
    """A conversation up to its last question, and the answer that is expected."""

    part: str
    prompt: Conversation
    expected: str


def evaluate(recipe: Recipe, run: Run, progress: Progress) -> dict[str, Any]:
    """Ask both models everything; the manifest `metrics`.

    Raises StageError when there is nothing to ask.
    """
    quiet_libraries()
    questions = _questions(run, recipe.evaluate.max_rows)
    base = base_folder(run)
    tuned = run.path / str(run.require("model", "phi3 train")["path"])
    extra: Conversation = [{"role": "user", "content": recipe.ask}]
    prompts = [*(question.prompt for question in questions), extra]
    total = 2 * len(prompts)
    was = _answers(recipe, base, prompts, _counter(progress, total, 0, "base model"))
    now = _answers(recipe, tuned, prompts, _counter(progress, total, len(prompts), "tuned model"))
    unasked = sum(answer is None for answer in now)
    before, after = [answer or "" for answer in was], [answer or "" for answer in now]
    _write_rows(run, questions, before, after)
    return {
        "before": _scores(questions, before[:-1]),
        "after": _scores(questions, after[:-1]),
        "ask": {"question": recipe.ask, "before": before[-1], "after": after[-1]},
        "rows": "evaluate/rows.jsonl",
        "settings": recipe.evaluate.model_dump(mode="json"),
        "choices": [
            f"{unasked} questions leave no room for an answer in the model's context "
            "and count as wrong: lower evaluate.max_new_tokens"
        ]
        if unasked
        else [],
    }


def _questions(run: Run, limit: int | None) -> list[Question]:
    questions = []
    for part in PARTS:
        path = run.path / "data" / f"{part}.jsonl"
        rows = read_rows([path]) if path.is_file() else []
        for row in _spread(rows, limit):
            questions.append(Question(part, row[:-1], row[-1]["content"]))
    if not questions:
        raise StageError("There is nothing to evaluate; prepare the chats: phi3 data prepare")
    return questions


def _spread(rows: Sequence[Conversation], limit: int | None) -> Sequence[Conversation]:
    """At most `limit` rows, taken evenly from the whole file."""
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _answers(
    recipe: Recipe, folder: Path, prompts: Sequence[Conversation], step: Callable[[int], None]
) -> list[str | None]:
    runtime = choose_runtime(recipe, count_weights(folder))
    with torch_threads(runtime.threads):
        return answers(
            folder,
            prompts,
            runtime,
            batch_size=recipe.evaluate.per_device_eval_batch_size,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            attention=recipe.model.attn_implementation,
            step=step,
        )


def _counter(progress: Progress, total: int, done: int, text: str) -> Callable[[int], None]:
    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, text)

    return step


def _scores(questions: Sequence[Question], given: Sequence[str]) -> dict[str, Any]:
    scores = {}
    for part in PARTS:
        chosen = [i for i, question in enumerate(questions) if question.part == part]
        if chosen:
            expected = [questions[i].expected for i in chosen]
            scores[part] = score([given[i] for i in chosen], expected)
    return scores


def _write_rows(
    run: Run, questions: Sequence[Question], before: Sequence[str], after: Sequence[str]
) -> None:
    """One line for each question: what was expected and what both models said."""
    lines = [
        {
            "part": question.part,
            "question": question.prompt[-1]["content"],
            "earlier_turns": question.prompt[:-1],
            "expected": question.expected,
            "before": was,
            "after": now,
            "before_right": exact_match(was, question.expected),
            "after_right": exact_match(now, question.expected),
        }
        for question, was, now in zip(questions, before, after, strict=False)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(run.file("evaluate", "rows.jsonl"), text)
