"""search.yaml: what is read, and every fault of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from phi3_training.errors import RecipeError
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.search.plan import IntRange, SearchPlan, load_plan, overrides_of

PROJECT = Path(__file__).resolve().parents[3]
GOOD = """\
metric: validation_loss
direction: minimize
trials: 4
parameters:
  finetune.learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
  finetune.lora_r: {type: int, low: 4, high: 16, step: 4}
  finetune.lr_scheduler_type: {type: categorical, choices: [linear, cosine]}
pruning: {startup_trials: 2}
"""


def plan_of(folder: Path, text: str, recipe_text: str = "finetune: {eval_steps: 5}") -> SearchPlan:
    (folder / "chats.jsonl").write_text("{}\n")
    recipe = folder / "recipe.yaml"
    base = "name: r\nmodel: {name_or_path: somebody/model}\ndata: {train: chats.jsonl}\n"
    recipe.write_text(base + recipe_text)
    (folder / "search.yaml").write_text(text)

    def make(overrides: Sequence[str]) -> Recipe:
        return load_recipe(recipe, overrides)

    return load_plan(folder / "search.yaml", make)


def faults_of(folder: Path, text: str, recipe_text: str = "finetune: {eval_steps: 5}") -> str:
    with pytest.raises(RecipeError) as caught:
        plan_of(folder, text, recipe_text)
    return "\n".join(caught.value.faults)


def test_reads_all_kinds_of_parameters(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GOOD)
    assert plan.trials == 4
    assert plan.seed == 42
    assert plan.parameters["finetune.lora_r"] == IntRange(type="int", low=4, high=16, step=4)
    assert plan.pruning is not None
    assert plan.pruning.startup_trials == 2


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    text = """\
metric: validation.loss
trials: 0
colour: 3
parameters:
  finetune.learning_rate: {type: float, low: 0, high: 5, log: true}
  finetune.lora_rr: {type: int, low: 2, high: 8}
  finetune.lora_alpha: {type: integer, low: 2}
  finetune.packing: {type: categorical, choices: [true]}
  serve.port: {type: categorical, choices: [1, 2]}
  data.seed: {type: int, low: 1, high: 9}
"""
    told = faults_of(tmp_path, text)
    for part in (
        "direction: is missing",
        "trials: expected 1 or more, got 0",
        "colour: unknown key",
        "metric: 'validation.loss' is unknown",
        "parameters.finetune.learning_rate: log needs a low above 0",
        "parameters.finetune.learning_rate: expected 1 or less, got 5",
        "parameters.finetune.lora_rr: unknown key",
        "parameters.finetune.lora_alpha: needs type: float, int or categorical",
        "parameters.finetune.packing.choices: expected a list of 2 or more",
        "parameters.serve.port: does not affect training",
        "parameters.data.seed: trials with other held-out chats",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{type: float, low: 3, high: 2}", "low must be below high"),
        ("{type: float, low: 0.1, high: 0.2, log: true, step: 0.1}", "log and step exclude"),
        ("{type: float, low: 0.1, high: 0.2, steps: 0.1}", "steps: unknown key"),
        ("{type: int, low: 1}", "high: is missing"),
        ("fast", "parameters.finetune.learning_rate: "),
    ],
)
def test_faulty_ranges(written: str, told: str, tmp_path: Path) -> None:
    text = GOOD.replace("{type: float, low: 1e-4, high: 1e-2, log: true}", written)
    assert told in faults_of(tmp_path, text)


def test_a_key_of_whole_numbers_refuses_a_float_range(tmp_path: Path) -> None:
    written = "{type: int, low: 4, high: 16, step: 4}"
    text = GOOD.replace(written, "{type: float, low: 4, high: 16}")
    assert "parameters.finetune.lora_r: expected a whole number" in faults_of(tmp_path, text)


def test_a_choice_that_the_recipe_refuses(tmp_path: Path) -> None:
    told = faults_of(tmp_path, GOOD.replace("[linear, cosine]", "[linear, straight]"))
    assert "parameters.finetune.lr_scheduler_type" in told
    assert "straight" in told


def test_held_out_loss_needs_evaluations_while_training(tmp_path: Path) -> None:
    told = faults_of(tmp_path, GOOD, "finetune: {}")
    assert "metric: validation_loss needs finetune.eval_steps" in told
    assert "pruning: needs finetune.eval_steps" in told


@pytest.mark.patient
def test_keys_that_belong_together_are_tried_together(tmp_path: Path) -> None:
    text = GOOD.replace(
        "pruning:",
        "  finetune.early_stopping_patience: {type: int, low: 2, high: 4}\n"
        "  finetune.eval_steps: {type: int, low: 2, high: 9}\npruning:",
    )
    assert len(plan_of(tmp_path, text, "finetune: {}").parameters) == 5


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    plan_of(tmp_path, GOOD)
    (tmp_path / "search.yaml").unlink()
    with pytest.raises(RecipeError, match="no such file"):
        load_plan(tmp_path / "search.yaml", lambda words: load_recipe(tmp_path / "recipe.yaml"))


def test_values_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    plan_of(tmp_path, GOOD)
    values = {"finetune.learning_rate": 1.23e-05, "finetune.packing": True, "finetune.lora_r": 7}
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides_of(values))
    assert recipe.finetune.learning_rate == 1.23e-05
    assert recipe.finetune.packing is True
    assert recipe.finetune.lora_r == 7


def test_the_example_of_the_docs_fits_the_shipped_recipe(tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "search.md").read_text("utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "search.yaml").write_text(example)
    recipe = PROJECT / "training" / "recipes" / "phi3-tiny.yaml"
    plan = load_plan(
        tmp_path / "search.yaml",
        lambda words: load_recipe(recipe, ["finetune.eval_steps=30", *words]),
    )
    assert plan.metric == "validation_loss"
    assert len(plan.parameters) == 3
