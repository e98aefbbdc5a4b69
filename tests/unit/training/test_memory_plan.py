"""`phi3 plan` and memory: what fits, what is refused, and that the named lever does fix it."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

from phi3_training.cli import main
from phi3_training.errors import StageError
from phi3_training.journey import Journey, PlanCheck, Stage, go
from phi3_training.manifests import Manifest
from phi3_training.memory import memory_plan, of_size
from phi3_training.memory.advise import changed
from phi3_training.memory.model import KNOWN
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


def line(plan: list[PlanLine], stage: str) -> PlanLine:
    return next(line for line in plan if line.stage == stage)


def test_large_gpu_takes_everything() -> None:
    plan = memory_plan(recipe(), of_size(80))
    assert [x.stage for x in plan] == ["finetune", "evaluate", "deploy", "memory"]
    assert not any(x.stops for x in plan)
    assert "our table" in line(plan, "finetune").text


def test_cuda_libraries_count_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain pip installs them on Linux, with or without a GPU."""
    needs = {}
    for has_cuda in (False, True):
        monkeypatch.setattr("phi3_training.memory.advise.torch_has_cuda", lambda h=has_cuda: h)
        needs[has_cuda] = line(memory_plan(recipe(), of_size(64, "cpu")), "finetune").details
    more = needs[True]["parts"]["overhead"] - needs[False]["parts"]["overhead"]
    assert more == 350 * 2**20


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
    fixed = line(memory_plan(cured, of_size(size)), "finetune")
    assert not fixed.stops, fixed.text
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


def test_what_cannot_be_fixed_says_how_much_is_needed() -> None:
    refused = line(memory_plan(recipe(), of_size(2)), "finetune")
    assert refused.stops
    assert "Even the smallest setting" in refused.text
    assert "finetune.method=qlora" in refused.text
    assert "GiB: use a larger device or a smaller model" in refused.text


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
    fixed = memory_plan(changed(start, refused.details["change"]), of_size(24))
    assert not line(fixed, "evaluate").stops


def test_serving_counts_whole_conversations() -> None:
    text = line(memory_plan(recipe(), of_size(24)), "deploy").text
    assert "one conversation of 2,304 tokens" in text
    assert "of 32 at once" in text
    refused = line(memory_plan(recipe(), of_size(8, "cpu")), "deploy")
    assert refused.stops
    assert refused.text.endswith("serve.precision=int4")


def test_unknown_model_does_not_stop() -> None:
    start = changed(recipe(), {"model.name_or_path": "nobody/nothing"})
    (only,) = memory_plan(start, of_size(1))
    assert not only.stops
    assert "cannot be predicted" in only.text


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
    assert "finetune   fits" in shown
    assert "evaluate   fits; memory" in shown


@pytest.mark.patient
@pytest.mark.parametrize("command", ["up", pytest.param("train", marks=pytest.mark.slow)])
def test_up_and_train_refuse_before_a_device_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """240 long rows at once fit no machine; the chats are prepared, nothing is downloaded."""
    words = ["finetune.per_device_train_batch_size=240", "finetune.gradient_checkpointing=false",
             f"data.train={long_chats(tmp_path)}", "data.validation=[]"]  # fmt: skip
    runs = tmp_path / "runs"
    assert main([command, "--runs", str(runs), MINI_RECIPE, *words]) == 1
    told = capsys.readouterr().err
    assert "Stopped before 'base'" in told
    assert "finetune.gradient_checkpointing=true" in told
    written = {path.name for path in runs.rglob("*.json")}
    assert written == {"dataset.json", "data-origins.json"}


def long_chats(folder: Path) -> Path:
    """241 conversations, none like another, each of more bytes than 2,048 tokens need."""
    draw = random.Random(0)  # noqa: S311 - words to train on, guards nothing
    rows = [
        {
            "prompt": f"{draw.random()}?",
            "completion": " ".join(str(draw.random()) for _ in "x" * 500),
        }
        for _ in range(241)
    ]
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_plan_begins_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then fails at what comes first: here weights that are not there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [f"model.name_or_path={hub_folder(tmp_path)}", "finetune.lora_r=1000000"]
    command = ["train", "--runs", str(tmp_path / "runs"), MINI_RECIPE, *words]
    assert main(command) == 1
    assert "does not fit" in capsys.readouterr().err
    assert main([*command, "--no-plan"]) == 1
    assert "contains no weights" in capsys.readouterr().err


def hub_folder(folder: Path) -> Path:
    """A folder as a hub's, with nothing but the config."""
    made = folder / "hub"
    made.mkdir()
    content = {**KNOWN["microsoft/Phi-3-mini-4k-instruct"], "architectures": ["Phi3ForCausalLM"]}
    (made / "config.json").write_text(json.dumps(content))
    return made


def test_config_alone_suffices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", MINI_RECIPE, f"model.name_or_path={hub_folder(tmp_path)}", "--device-gb=24"]
    assert main([*words, "--runs", str(tmp_path / "runs")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "3,821.1 M weights by" in shown
    assert "hub/config.json" in shown
    assert "not measured on a GPU yet" in shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device-gb", "none"]])
def test_half_a_device_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    try:
        status = main(["plan", "--runs", str(tmp_path), *words])
    except SystemExit as error:  # argparse's own way
        status = int(error.code or 0)
    assert status == 2
    assert "such as 24" in capsys.readouterr().err or words[0] == "--device"


class Crowded:
    """A target without room for one stage."""

    cloud = None

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def plan(self, *_: object) -> list[PlanLine]:
        return [PlanLine(self.stage, "too large; lower x=1", stops=True)]


@pytest.fixture
def crowded(tmp_path: Path) -> Journey:
    """A journey whose target has no room for the evaluation."""
    target: Any = Crowded("evaluate")
    return Journey(Recipe.model_construct(name="toy"), Run.open(tmp_path / "r"), target, tmp_path)


@cache
def kind_of(title: str) -> type[Manifest]:
    return type(title, (Manifest,), {"STAGE": title, "COMMAND": "phi3 up"})


def stage(title: str) -> Stage[Any]:
    kind = kind_of(title)
    return Stage(kind, title, (), lambda _: 0, lambda _: kind(), lambda _: "done")


def test_stage_to_be_done_is_refused(crowded: Journey) -> None:
    to_do = [stage("finetune"), stage("evaluate")]
    with pytest.raises(StageError, match=r"evaluate: too large; lower x=1[\s\S]*--no-plan"):
        PlanCheck(crowded).before(to_do)
    crowded.no_plan = True
    PlanCheck(crowded).before(to_do)


def test_other_stages_are_not_refused(crowded: Journey) -> None:
    PlanCheck(crowded).before([stage("finetune")])
    PlanCheck(crowded).before([stage("ask"), stage("evaluate")])  # not yet at a device


def test_what_is_done_is_not_refused_unless_it_is_done_again(crowded: Journey) -> None:
    stages = [stage("finetune"), stage("evaluate"), stage("ask")]
    crowded.no_plan = True
    go(crowded, stages[:2])
    crowded.no_plan = False
    go(crowded, stages)
    with pytest.raises(StageError, match="too large"):
        go(crowded, stages, again=frozenset({kind_of("evaluate")}))


def test_chats_are_prepared_before_the_plan_is_asked(crowded: Journey) -> None:
    """And base before the second look, which has its tokenizer: a target that learns both."""
    asked: list[list[str]] = []

    class Watching(Crowded):
        def plan(self, _recipe: object, run: Run) -> list[PlanLine]:
            asked.append([n for n in ("prepare", "base") if run.read(kind_of(n)) is not None])
            return []

    crowded.target = cast(Any, Watching(""))
    go(crowded, [stage(n) for n in ("prepare", "base", "finetune", "evaluate")])
    assert asked == [["prepare"], ["prepare", "base"]]


def test_processes_of_a_cpu_share_its_memory() -> None:
    one, two = (
        line(memory_plan(recipe(num_processes=n), of_size(64, "cpu")), "finetune") for n in (1, 2)
    )
    assert two.details["bytes"] > 1.9 * one.details["bytes"]
    assert "in each of 2 processes" in two.text
    alone, beside = (
        line(memory_plan(recipe(num_processes=n), of_size(24)), "finetune") for n in (1, 2)
    )
    # each has a GPU of its own, and what it exchanges
    assert beside.details["parts"]["exchange"] == alone.details["parts"]["gradients"]


def test_conversion_that_cannot_be_done_is_refused_with_its_lever() -> None:
    start = changed(recipe(), {"serve.precision": "int4", "serve.engine": "onnxruntime"})
    lines = memory_plan(start, of_size(16, "cpu"))
    (refused,) = [x for x in lines if x.details.get("phase") == "convert"]
    assert refused.stops
    assert refused.text.endswith("serve.engine=transformers")
