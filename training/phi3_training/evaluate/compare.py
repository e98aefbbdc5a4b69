"""Before and after: the same questions to the base and to the tuned model.

Reads run/data/*.jsonl, the base model and run/model; writes run/evaluate/rows.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from ..data.prepare import question_of
from ..errors import StageError, shortened
from ..finetune.rewordings import Conversation
from ..finetune.runtime import quiet_libraries
from ..finetune.weights import base_folder, chat_format
from ..manifests import Asked as AskedBoth
from ..manifests import Comparison, Figure, MetricsManifest, ModelManifest, Resampling
from ..progress import Progress
from ..recipe import EvaluateSection, Recipe
from ..run import Run
from .answers import Asked, choose_judge
from .figures import compare, metrics_for, seed_of
from .questions import PARTS, Question, collect
from .rows import (
    PATH,
    Answered,
    Row,
    Side,
    is_right,
    make_rows,
    remember,
    remembered,
    write_rows,
)

Step = Callable[[int], None]

_SOME = 8  # faults that are listed


def evaluate(recipe: Recipe, run: Run, progress: Progress) -> MetricsManifest:
    """Ask both models everything; the manifest.

    Raises StageError if there are no questions, or a model cannot be queried.
    """
    quiet_libraries()
    questions = collect(recipe.evaluate, run)
    base = base_folder(run)
    chat = chat_format(base)
    # Before any model is loaded: a template's refusal would else come after minutes of answers.
    faults = []
    for q in questions:
        try:
            chat.encode_prompt(q.prompt)
        except ValueError as error:
            place = q.origin or f"data/{q.part}.jsonl:{q.line} of the run"
            faults.append(f"{place}: {error}")
    if faults:
        listed = "".join(f"\n  {line}" for line in shortened(faults, _SOME))
        raise StageError(f"{len(faults)} questions cannot be asked of this model:{listed}")
    tuned = run.path / run.require(ModelManifest).path
    question = question_of(recipe, run)
    own = Asked([{"role": "user", "content": question}])
    # Each question once: greedy answers to the same prompt are the same. One without an expected
    # answer is left out where the same question is there with one.
    every = [*(Asked(q.prompt, q.expected) for q in questions), own]
    measured = {_key(question.prompt) for question in every if question.expected}
    distinct = {
        _key(question.whole): question
        for question in every
        if question.expected or _key(question.prompt) not in measured
    }
    asked = list(distinct.values())
    judge = choose_judge(recipe, run)
    # The base model's answers stay the same while only the tuning changes: half of the time.
    total = 2 * len(asked)
    key = judge.base_key(asked)
    known = remembered(run, key)
    if known is None:
        step = _counter(progress, total, 0, "base model")
        known = judge.examine(base, asked, step)
        remember(run, key, known)
    else:
        progress(len(asked), total, "reusing the base model's answers from an earlier evaluation")
    step = _counter(progress, total, len(asked), "tuned model")
    was, now = _Examined(asked, known), _Examined(asked, judge.examine_tuned(tuned, asked, step))
    rows = make_rows(questions, was.answered(questions), now.answered(questions))
    write_rows(run, rows)
    unasked = sum(said is None for said in now.said.values())
    cut = sum(row["after_scores"]["cut"] for row in rows)
    remarks = []
    if unasked:
        remarks.append(
            f"{unasked} questions do not fit the model's context and count as wrong: shorten them"
        )
    if cut > unasked:
        remarks.append(
            f"{cut} of {len(rows)} answers of the tuned model were cut at "
            "evaluate.max_new_tokens: raise it"
        )
    return figures_of(rows, recipe.evaluate).model_copy(
        update={
            "ask": AskedBoth(
                question=question, before=was.text(own.prompt), after=now.text(own.prompt)
            ),
            "answered_by": judge.as_dict(),
            "choices": [judge.sentence, *remarks],
        }
    )


class _Examined:
    """One model's answer to each distinct prompt, and its losses by prompt and expected answer."""

    def __init__(self, asked: Sequence[Asked], answered: Sequence[Answered]) -> None:
        pairs = list(zip(asked, answered, strict=True))
        self.said = {_key(question.prompt): answer.said for question, answer in pairs}
        self._losses = {_key(question.whole): answer.loss for question, answer in pairs}

    def text(self, prompt: Conversation) -> str:
        said = self.said[_key(prompt)]
        return said.text if said is not None else ""

    def answered(self, questions: Sequence[Question]) -> list[Answered]:
        return [
            Answered(
                self.said[_key(question.prompt)],
                self._losses[_key(Asked(question.prompt, question.expected).whole)]
                if question.expected
                else None,
            )
            for question in questions
        ]


def _key(prompt: Conversation) -> str:
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def _counter(progress: Progress, total: int, done: int, text: str) -> Step:
    """Counts the answers of one model."""

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, text)

    return step


def figures_of(rows: Sequence[Row], settings: EvaluateSection) -> MetricsManifest:
    """The figures of each part that has rows."""
    sides: dict[Side, dict[str, dict[str, Figure]]] = {"before": {}, "after": {}}
    comparisons: dict[str, dict[str, Comparison]] = {}
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
        for side, figures_of_side in sides.items():
            figures = {name: round(getattr(c, side), 6) for name, c in compared.items()}
            correct = sum(is_right(row, side) is True for row in chosen)
            figures_of_side[part] = {"rows": len(chosen), "correct": correct, **figures}
        comparisons[part] = compared
    return MetricsManifest(
        before=sides["before"],
        after=sides["after"],
        comparisons=comparisons,
        rows=PATH,
        settings=Resampling.model_validate(settings.model_dump(mode="json")),
    )
