"""A search over the small run of `small_run`, here or in a process that may be killed.

Writes into the folders it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import forked

from phi3_training.journey import Journey
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run
from phi3_training.search.plan import load_plan
from phi3_training.search.study import search
from phi3_training.targets import get_target

TRIALS = 4
SEARCH = f"""\
metric: validation_loss
direction: minimize
trials: {TRIALS}
seed: 3
parameters:
  finetune.learning_rate: {{type: float, low: 1e-3, high: 5e-2, log: true}}
  finetune.lora_r: {{type: int, low: 2, high: 8, step: 2}}
  finetune.lr_scheduler_type: {{type: categorical, choices: [linear, cosine]}}
"""
SETTINGS = [
    "finetune.eval_steps=7",
    "finetune.num_train_epochs=2",
    "finetune.save_steps=3",
    "finetune.lora_dropout=0",
]
SEARCH_IN = """
import sys
from pathlib import Path
from phi3_training.journey import Journey
from phi3_training.recipe import load_recipe
from phi3_training.run import Run
from phi3_training.search.plan import load_plan
from phi3_training.search.study import search
from phi3_training.targets import get_target

run, settings = Path(sys.argv[1]), sys.argv[2:]

def make(overrides):
    return load_recipe(run.parent / "recipe.yaml", [*settings, *overrides])

journey = Journey(make([]), Run(run), get_target("local"), run / "no-flow")
search(journey, load_plan(run.with_suffix(".yaml"), make), make)
"""


def journey_of(run: Path, overrides: Sequence[str]) -> Journey:
    recipe = load_recipe(run.parent / "recipe.yaml", overrides)
    return Journey(recipe, Run(run), get_target("local"), run / "no-flow")


def run_search(
    run: Path, text: str = SEARCH, settings: Sequence[str] = tuple(SETTINGS)
) -> dict[str, Any]:
    def make(overrides: Sequence[str]) -> Recipe:
        return load_recipe(run.parent / "recipe.yaml", [*settings, *overrides])

    path = run.with_suffix(".yaml")
    path.write_text(text)
    return search(journey_of(run, settings), load_plan(path, make), make)


def start(run: Path) -> forked.Forked:
    """Search in a process of its own."""
    run.with_suffix(".yaml").write_text(SEARCH)
    with run.with_suffix(".log").open("a") as log:
        return forked.start(["-c", SEARCH_IN, str(run), *SETTINGS], stdout=log, stderr=log)
