"""Before and after: the same questions to the base and to the tuned model.

Reads run/data/*.jsonl, the base model and run/model; writes run/evaluate/rows.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..finetune import Progress
from ..finetune.rows import Conversation
from ..finetune.runtime import choose_runtime, quiet_libraries, torch_threads
from ..finetune.weights import base_folder, chat_format, count_weights, load_model
from ..recipe import EvaluateSection, Recipe
from ..run import Run
from .asking import ask_all
from .figures import Comparison, compare, metrics_for, seed_of
from .perplexity import answer_losses
from .questions import PARTS, Question, collect
from .rows import PATH, Answered, AnswerLoss, Row, Said, make_rows, write_rows

Step = Callable[[int], None]


def evaluate(recipe: Recipe, run: Run, progress: Progress) -> dict[str, Any]:
    """Ask both models everything; the manifest `metrics`.

    Raises StageError when there is nothing to ask, or a model cannot be asked.
    """
    quiet_libraries()
    questions = collect(recipe.evaluate, run)
    base = base_folder(run)
    tuned = run.path / str(run.require("model", "phi3 train")["path"])
    asked = [{"role": "user", "content": recipe.ask}]
    prompts = _distinct([*(question.prompt for question in questions), asked])
    total = 2 * len(prompts)
    was = _examine(recipe, base, questions, prompts, _counter(progress, total, 0, "base model"))
    step = _counter(progress, total, len(prompts), "tuned model")
    now = _examine(recipe, tuned, questions, prompts, step)
    rows = make_rows(questions, was.answered(questions), now.answered(questions))
    write_rows(run, rows)
    return {
        **figures_of(rows, recipe.evaluate),
        "ask": {"question": recipe.ask, "before": was.text(asked), "after": now.text(asked)},
        "rows": PATH,
        "settings": recipe.evaluate.model_dump(mode="json"),
        "choices": _remarks(rows, now),
    }


class _Examined:
    """What one model said to each distinct prompt, and its losses by question."""

    def __init__(
        self,
        prompts: Sequence[Conversation],
        said: Sequence[Said | None],
        losses: Sequence[AnswerLoss | None],
    ) -> None:
        self.said = dict(zip(map(_key, prompts), said, strict=True))
        self.losses = losses

    def text(self, prompt: Conversation) -> str:
        said = self.said[_key(prompt)]
        return said.text if said is not None else ""

    def answered(self, questions: Sequence[Question]) -> list[Answered]:
        pairs = zip(questions, self.losses, strict=True)
        return [Answered(self.said[_key(question.prompt)], loss) for question, loss in pairs]


def _examine(
    recipe: Recipe,
    folder: Path,
    questions: Sequence[Question],
    prompts: Sequence[Conversation],
    step: Step,
) -> _Examined:
    """Load a model once, ask it everything, and measure how it finds the expected answers."""
    settings = recipe.evaluate
    runtime = choose_runtime(recipe, count_weights(folder))
    chat = chat_format(folder)
    with torch_threads(runtime.threads):
        model = load_model(folder, runtime.torch_dtype, recipe.model.attn_implementation)
        model = model.to(runtime.device).eval()
        said = ask_all(
            model,
            folder,
            chat,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            at_once=settings.per_device_eval_batch_size,
            step=step,
        )
        known = [i for i, question in enumerate(questions) if question.expected]
        whole = [_with_answer(questions[i]) for i in known]
        losses: list[AnswerLoss | None] = [None] * len(questions)
        for i, loss in zip(known, answer_losses(model, chat, whole), strict=True):
            losses[i] = loss
    return _Examined(prompts, said, losses)


def _with_answer(question: Question) -> Conversation:
    return [*question.prompt, {"role": "assistant", "content": question.expected}]


def _distinct(prompts: Sequence[Conversation]) -> list[Conversation]:
    """Each prompt once: greedy answers to the same prompt are the same."""
    return list({_key(prompt): prompt for prompt in prompts}.values())


def _key(prompt: Conversation) -> str:
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def _counter(progress: Progress, total: int, done: int, text: str) -> Step:
    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, text)

    return step


def figures_of(rows: Sequence[Row], settings: EvaluateSection) -> dict[str, Any]:
    """`before`, `after` and `comparisons` of each part that has rows."""
    found: dict[str, Any] = {"before": {}, "after": {}, "comparisons": {}}
    for part in PARTS:
        chosen = [row for row in rows if row["part"] == part]
        if not chosen:
            continue
        compared = compare(
            chosen,
            metrics_for(chosen),
            confidence=settings.confidence,
            resamples=settings.resamples,
            seed=seed_of(part, settings.seed),
        )
        for side in ("before", "after"):
            found[side][part] = _side(chosen, compared, side)
        found["comparisons"][part] = {name: asdict(c) for name, c in compared.items()}
    return found


def _side(rows: Sequence[Row], compared: dict[str, Comparison], side: str) -> dict[str, Any]:
    figures = {name: round(getattr(c, side), 6) for name, c in compared.items()}
    correct = sum(row[f"{side}_right"] is True for row in rows)
    return {"rows": len(rows), "correct": correct, **figures}


def _remarks(rows: Sequence[Row], now: _Examined) -> list[str]:
    unasked = sum(said is None for said in now.said.values())
    cut = sum(row["after_scores"]["cut"] for row in rows)
    found = []
    if unasked:
        found.append(
            f"{unasked} questions fill the model's context and count as wrong: shorten them"
        )
    if cut > unasked:
        found.append(
            f"{cut} of {len(rows)} answers of the tuned model were cut at "
            "evaluate.max_new_tokens: raise it"
        )
    return found
