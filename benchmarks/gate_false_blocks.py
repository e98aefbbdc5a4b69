"""How often the gate would block a model that passed, had other rows been drawn.

Reads runs/NAME/evaluate/rows.jsonl; each resample draws as many rows of each part with replacement
and is judged by the recipe's gate. Also judges the same rows with planted faults: what must be
blocked. Run: python benchmarks/gate_false_blocks.py RUN_FOLDER [RECIPE] [key=value …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phi3_training.evaluate.gate import decide, summary
from phi3_training.evaluate.questions import PARTS, Question
from phi3_training.evaluate.rows import Answered, AnswerLoss, Row, Said, make_rows, read_rows
from phi3_training.recipe import load_recipe
from phi3_training.run import Run

RESAMPLES = 200
DEFAULT_RECIPE = Path(__file__).parents[1] / "training/recipes/phi3-tiny.yaml"
Fault = Callable[[Sequence[Row], np.random.Generator], list[str]]


def resampled(rows: Sequence[Row], draw: np.random.Generator) -> list[Row]:
    """As many rows of each part as there are, drawn with replacement."""
    found: list[Row] = []
    for part in PARTS:
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            found += [chosen[i] for i in draw.integers(0, len(chosen), len(chosen))]
    return found


def shuffled(rows: Sequence[Row], draw: np.random.Generator) -> list[str]:
    """Held-out questions get each other's answers."""
    places = [i for i, row in enumerate(rows) if row["part"] == "validation"]
    answers = [row["after"] for row in rows]
    for place, other in zip(places, draw.permutation(places), strict=True):
        answers[place] = rows[other]["after"]
    return answers


def forgetful(rows: Sequence[Row], draw: np.random.Generator) -> list[str]:
    """Every second old answer is lost."""
    old = ("replay", "canary")
    return ["" if r["part"] in old and draw.random() < 0.5 else r["after"] for r in rows]


def obliging(rows: Sequence[Row], draw: np.random.Generator) -> list[str]:  # noqa: ARG001
    """Nothing that is to be refused is refused any more (where the base refused all of it)."""
    return ["Sure, here it is." if row["part"] == "probes" else row["after"] for row in rows]


def with_answers(rows: Sequence[Row], after: Sequence[str], *, base_refuses: bool) -> list[Row]:
    """The rows as if the tuned model had said `after`."""

    def said(row: Row, text: str, side: str) -> Answered:
        scores = row[f"{side}_scores"]
        loss = AnswerLoss(scores["nll"], scores["tokens"]) if "nll" in scores else None
        return Answered(Said(text, bool(scores["cut"])), loss)

    refusal = "I'm sorry, but I can't help with that."
    before = [
        refusal if base_refuses and row["part"] == "probes" else row["before"] for row in rows
    ]
    questions = [
        Question(
            row["part"],
            row["line"],
            [*row["earlier_turns"], {"role": "user", "content": row["question"]}],
            row["expected"],
            tuple(row["accept"]),
        )
        for row in rows
    ]
    sides = ((before, "before"), (after, "after"))
    return make_rows(
        questions,
        *([said(r, t, side) for r, t in zip(rows, texts, strict=True)] for texts, side in sides),
    )


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0])
    words = arguments[1:]
    named = [word for word in words if "=" not in word]
    recipe = load_recipe(
        Path(named[0]) if named else DEFAULT_RECIPE, [word for word in words if "=" in word]
    )
    rows = read_rows(Run(folder.resolve()))
    draw = np.random.default_rng(7)

    def blocked(given: Sequence[Row]) -> int:
        samples = (resampled(given, draw) for _ in range(RESAMPLES))
        return sum(not decide(s, recipe.gate, recipe.evaluate)["passed"] for s in samples)

    found: dict[str, Any] = {
        "run": folder.name,
        "verdict": summary(decide(rows, recipe.gate, recipe.evaluate)),
        "resamples": RESAMPLES,
        "blocked": {"as it is": blocked(rows)},
    }
    faults: dict[str, Fault] = {
        "answers shuffled": shuffled,
        "old answers lost": forgetful,
        "nothing refused": obliging,
    }
    for name, fault in faults.items():
        spoilt = with_answers(rows, fault(rows, draw), base_refuses=name == "nothing refused")
        found["blocked"][name] = blocked(spoilt)
    print(json.dumps(found, indent=2))
    rate = found["blocked"]["as it is"] / RESAMPLES
    print(f"false-block rate: {rate:.1%} of {RESAMPLES} resamples")
    for name in faults:
        print(f"caught, {name}: {found['blocked'][name] / RESAMPLES:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
