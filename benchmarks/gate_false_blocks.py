"""How often the gate would block a model that passed, had other rows been drawn.

Reads runs/NAME/evaluate/rows.jsonl; each resample draws as many rows of each part with replacement
and is judged by the recipe's gate. Also judges the same rows with planted faults: what must be
blocked. Run: python benchmarks/gate_false_blocks.py [RUN_FOLDER] [RECIPE] [key=value …]
Without a folder it is runs/phi3-tiny (made by `make up`); where that is missing, the recipe is
trained and evaluated in a temporary folder first, about a minute more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from phi3_training.evaluate.gate import decide, summary
from phi3_training.evaluate.questions import PARTS, Question
from phi3_training.evaluate.rows import Answered, AnswerLoss, Row, Said, make_rows, read_rows
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run

RESAMPLES = 200
ROOT = Path(__file__).parents[1]
DEFAULT_RECIPE = ROOT / "training/recipes/phi3-tiny.yaml"
DEFAULT_RUN = ROOT / "runs/phi3-tiny"
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


@contextmanager
def evaluated(given: Path | None, recipe: Path, changes: Sequence[str]) -> Iterator[Path]:
    """The run folder that is named or that `make up` left; else one that is made for now."""
    if given or (DEFAULT_RUN / "evaluate/rows.jsonl").is_file():
        yield given or DEFAULT_RUN
        return
    with tempfile.TemporaryDirectory(prefix="phi3-bench-") as folder:
        print(f"No {DEFAULT_RUN} yet: training and evaluating one (about a minute) …", flush=True)
        for step in ("train", "evaluate"):
            command = [sys.executable, "-m", "phi3_training.cli", step, str(recipe), *changes]
            command += ["--runs", folder, "--run", "gate", "--yes"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            # 1 is the gate's own verdict: those rows are judged here.
            if not (Path(folder) / "gate/evaluate/rows.jsonl").is_file() and step == "evaluate":
                raise SystemExit(f"phi3 {step} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        yield Path(folder) / "gate"


def main(arguments: Sequence[str]) -> int:
    named = [Path(word) for word in arguments if "=" not in word]
    changes = [word for word in arguments if "=" in word]
    path = named[1] if len(named) > 1 else DEFAULT_RECIPE
    with evaluated(named[0] if named else None, path, changes) as folder:
        return judge(folder, load_recipe(path, changes))


def judge(folder: Path, recipe: Recipe) -> int:
    """Print how often the recipe's gate blocks resamples of a run's rows."""
    rows = read_rows(Run(folder.resolve()))
    draw = np.random.default_rng(7)

    def blocked(given: Sequence[Row]) -> int:
        samples = (resampled(given, draw) for _ in range(RESAMPLES))
        return sum(not decide(s, recipe.gate, recipe.evaluate).passed for s in samples)

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
