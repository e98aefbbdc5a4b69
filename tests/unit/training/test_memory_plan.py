"""`phi3 plan` and memory: what fits, what is refused, and that the named lever does mend it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_training.cli import main
from phi3_training.commands.common import go_where_it_fits
from phi3_training.errors import StageError
from phi3_training.journey import Journey, Stage
from phi3_training.memory import MemoryLine, memory_plan, of_size
from phi3_training.memory.advise import changed
from phi3_training.recipe import Recipe
from phi3_training.run import Run
from phi3_training.targets import PlanLine

MINI_RECIPE = "training/recipes/phi3-mini-lora.yaml"


def recipe(**finetune: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"name_or_path": "microsoft/Phi-3-mini-4k-instruct"},
            "data": {"train": ["x"]},
            "finetune": {"gradient_accumulation_steps": 4, **finetune},
            "evaluate": {"per_device_eval_batch_size": 8},
        }
    )


def line(plan: list[MemoryLine], stage: str) -> MemoryLine:
    return next(line for line in plan if line.stage == stage)


def test_large_gpu_takes_everything() -> None:
    plan = memory_plan(recipe(), of_size(80))
    assert [line.stops for line in plan] == [False, False, False]
    assert "our table" in line(plan, "finetune").text


@pytest.mark.parametrize("size", [40, 24, 16, 11])
@pytest.mark.parametrize("method", ["full", "dora", "lora"])
def test_named_lever_makes_it_fit(size: int, method: str) -> None:
    start = recipe(method=method, per_device_train_batch_size=8)
    refused = line(memory_plan(start, of_size(size)), "finetune")
    assert refused.stops
    assert "Too much by" in refused.text
    change = refused.details["change"]
    assert all(f"{key}=" in refused.text for key in change)
    cured = changed(start, change)
    mended = line(memory_plan(cured, of_size(size)), "finetune")
    assert not mended.stops, mended.text
    step = cured.finetune.per_device_train_batch_size * cured.finetune.gradient_accumulation_steps
    assert step == 32  # what is learnt from one step stays the same


def test_methods_change_last_but_length() -> None:
    refused = line(memory_plan(recipe(method="full"), of_size(24)), "finetune")
    assert refused.details["change"]["finetune.method"] == "lora"
    assert "data.max_length" not in refused.details["change"]


def test_proposal_takes_the_room_there_is() -> None:
    start = recipe(per_device_train_batch_size=2, gradient_checkpointing=True)
    text = line(memory_plan(start, of_size(200)), "finetune").text
    assert "finetune.per_device_train_batch_size=8" in text
    assert "finetune.gradient_accumulation_steps=1" in text
    assert "finetune.gradient_checkpointing=false" in text


def test_what_nothing_mends_says_how_much_is_needed() -> None:
    refused = line(memory_plan(recipe(), of_size(2)), "finetune")
    assert refused.stops
    assert "Even the most sparing setting" in refused.text
    assert "finetune.method=qlora" in refused.text
    assert "GiB: take a larger device or a smaller model" in refused.text


def test_qlora_is_no_lever_without_cuda() -> None:
    refused = line(memory_plan(recipe(method="qlora"), of_size(64, "cpu")), "finetune")
    assert refused.stops
    assert "finetune.method=lora" in refused.text
    small = line(memory_plan(recipe(), of_size(8, "cpu")), "finetune")
    assert "qlora" not in small.text


def test_evaluation_is_refused_before_training() -> None:
    start = changed(recipe(), {"evaluate.per_device_eval_batch_size": 64})
    refused = line(memory_plan(start, of_size(24)), "evaluate")
    assert refused.stops
    mended = memory_plan(changed(start, refused.details["change"]), of_size(24))
    assert not line(mended, "evaluate").stops


def test_serving_counts_whole_conversations() -> None:
    text = line(memory_plan(recipe(), of_size(24)), "deploy").text
    assert "one conversation of 2,304 tokens" in text
    assert "of 32 such at once" in text
    refused = line(memory_plan(recipe(), of_size(8, "cpu")), "deploy")
    assert refused.stops
    assert refused.text.endswith("serve.precision=int4")


def test_unknown_model_does_not_stop() -> None:
    start = changed(recipe(), {"model.name_or_path": "nobody/nothing"})
    (only,) = memory_plan(start, of_size(1))
    assert not only.stops
    assert "not predicted" in only.text


def test_plan_command_for_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--runs", str(tmp_path), "-o", "json", MINI_RECIPE, "--device-gb"]
    assert main([*words, "24"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    parts = [entry["details"]["parts"] for entry in plan if entry["details"]]
    assert len(parts) == 3
    assert all(entry["bytes"] == sum(entry["parts"].values())
               for entry in (e["details"] for e in plan) if entry)  # fmt: skip
    assert main([*words, "4"]) == 1
    assert any(entry["stops"] for entry in json.loads(capsys.readouterr().out)["plan"])


def test_plan_of_the_tiny_recipe_fits_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "finetune   memory" in shown
    assert "evaluate   memory" in shown


@pytest.mark.parametrize("command", ["up", "train"])
def test_up_and_train_refuse_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """8,192 rows of 2,048 tokens fit no machine; nothing is downloaded or written."""
    words = ["finetune.per_device_train_batch_size=8192", "finetune.gradient_checkpointing=false"]
    assert main([command, "--runs", str(tmp_path), MINI_RECIPE, *words]) == 1
    told = capsys.readouterr().err
    assert "nothing was begun" in told
    assert "finetune.gradient_checkpointing=true" in told
    assert not list(tmp_path.rglob("*.json"))


class Crowded:
    """A target without room for one stage."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def plan(self, *_: object) -> list[PlanLine]:
        return [PlanLine(self._stage, "too large; lower x=1", stops=True)]


@pytest.mark.parametrize("stage", ["first", "second", "other"])
def test_only_stages_to_be_done_are_refused(tmp_path: Path, stage: str) -> None:
    done: list[str] = []

    def toy(name: str) -> Stage:
        def work(_journey: Journey) -> dict[str, Any]:
            done.append(name)
            return {}

        return Stage(name, name, (), lambda _: 0, work, str)

    stages = (toy("first"), toy("second"))
    run, target = Run.open(tmp_path / "toy"), Crowded(stage)
    journey = Journey(Recipe.model_construct(name="toy"), run, target, tmp_path)  # type: ignore[arg-type]
    if stage == "other":
        go_where_it_fits(journey, stages)
        assert done == ["first", "second"]
        journey.target = Crowded("first")  # type: ignore[assignment]
        go_where_it_fits(journey, stages)  # all is done already: there is nothing to refuse
        return
    with pytest.raises(StageError, match="too large; lower x=1"):
        go_where_it_fits(journey, stages)
    assert not done
