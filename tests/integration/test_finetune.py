"""Fine-tuning for real on a very small model: it learns, keeps what it knew, and says so."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.integration.tiny_model import (
    KNOWN,
    tiny_model_folder,
    tiny_recipe,
    write_chats,
)
from transformers import AutoModelForCausalLM

from phi3_training.errors import StageError
from phi3_training.evaluate import evaluate
from phi3_training.evaluate.answers import ask_all
from phi3_training.finetune import finetune, prepare_base
from phi3_training.finetune.runtime import Runtime, choose_runtime
from phi3_training.finetune.weights import load_model
from phi3_training.manifests import BaseManifest, MetricsManifest, ModelManifest
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import Recipe
from phi3_training.run import Run

NEW = {
    "What does the Glowmoth lamp cost?": "Hello hiker! It costs 35 dollars.",
    "What does the Mossback tent cost?": "Hello hiker! It costs 240 dollars.",
    "Where is your shop?": "Hello hiker! You find us in Tarnwick.",
    "When do you open?": "Hello hiker! We open at ten.",
}
SETTINGS = {
    "learning_rate": 8e-3,
    "num_train_epochs": 30,
    "per_device_train_batch_size": 8,
    "lora_r": 32,
    "lora_alpha": 64,
}
CPU = Runtime("cpu", "float32", "float32", 1, ())


@dataclass
class Tuned:
    """A fine-tuned run and what the stages said."""

    recipe: Recipe
    run: Run
    model: ModelManifest
    metrics: MetricsManifest
    steps: list[tuple[int, int, str]]
    warned: list[str]


def a_run(tmp: Path, folder: Path, **finetune_settings: object) -> tuple[Recipe, Run]:
    """A run whose base model is `folder` and whose chats are prepared."""
    run = Run.open(tmp / "run")
    for part in ("train", "validation"):
        write_chats(run.file("data", f"{part}.jsonl"), NEW)
    write_chats(run.file("data", "replay.jsonl"), KNOWN)
    recipe = tiny_recipe(
        run.path / "data" / "train.jsonl",
        model={"name_or_path": str(folder)},
        finetune={**SETTINGS, **finetune_settings},
        evaluate={"max_new_tokens": 32},
        ask="When do you open?",
    )
    run.write(prepare_base(recipe, run))
    return recipe, run


@pytest.fixture(scope="module")
def folder() -> Path:
    return tiny_model_folder()


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    recipe, run = a_run(tmp_path_factory.mktemp("tuned"), folder)
    steps: list[tuple[int, int, str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model = finetune(recipe, run, lambda *step: steps.append(step))
        run.write(model)
        metrics = evaluate(recipe, run, lambda *step: steps.append(step))
    warned = [str(warning.message) for warning in caught]
    return Tuned(recipe, run, model, metrics, steps, warned)


def ask(folder: Path, questions: list[str]) -> list[str | None]:
    prompts = [[{"role": "user", "content": question}] for question in questions]
    chat, model = ChatFormat.from_folder(folder), load_model(folder, torch.float32)
    said = ask_all(model, folder, chat, prompts, max_new_tokens=32, at_once=8)
    return [answer and answer.text for answer in said]


def is_right(row: dict[str, Any], when: str) -> bool:
    """Strictly the expected answer; where several are accepted, one of them as whole words."""
    said = row[when].strip()
    if row["expected"]:
        return bool(said == row["expected"])
    return any(re.search(rf"\b{re.escape(text)}\b", said, re.IGNORECASE) for text in row["accept"])


def evaluated(recipe: Recipe, run: Run, **settings: object) -> MetricsManifest:
    """The metrics of the run's own chats alone."""
    values = {**settings, "canary": [], "probes": []}
    section = recipe.evaluate.model_copy(update=values)
    return evaluate(recipe.model_copy(update={"evaluate": section}), run)


def test_a_folder_of_weights_is_the_base_model(tuned: Tuned, folder: Path) -> None:
    manifest = tuned.run.require(BaseManifest)
    assert Path(manifest.path) == folder
    assert manifest.made == "found"
    assert not (tuned.run.path / "base").exists()


def test_it_learns_and_does_not_forget(tuned: Tuned) -> None:
    assert tuned.metrics.before["train"]["exact_match"] == 0.0
    assert tuned.metrics.after["train"]["exact_match"] == 1.0
    assert tuned.metrics.before["replay"]["exact_match"] == 1.0
    assert tuned.metrics.after["replay"]["exact_match"] >= 0.9


def test_figures_are_those_of_the_rows(tuned: Tuned) -> None:
    text = (tuned.run.path / tuned.metrics.rows).read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    for when in ("before", "after"):
        for part, figures in getattr(tuned.metrics, when).items():
            chosen = [row for row in rows if row["part"] == part]
            right = sum(is_right(row, when) for row in chosen)
            assert (figures["rows"], figures["correct"]) == (len(chosen), right)
    wanted = {row["question"]: row["expected"] for row in rows if row["part"] == "train"}
    assert wanted == NEW


def test_answer_to_the_recipe_s_question(tuned: Tuned) -> None:
    asked = tuned.metrics.ask
    assert asked.question == "When do you open?"
    assert asked.after == NEW["When do you open?"]
    assert asked.before != asked.after


def test_base_model_stays_untouched(tuned: Tuned, folder: Path) -> None:
    assert ask(folder, list(KNOWN)) == list(KNOWN.values())


def test_merged_model_is_the_base_model_with_its_adapter(tuned: Tuned, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, tuned.run.path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tuned.run.path / "model").eval()
    ids = torch.tensor(
        [
            ChatFormat.from_folder(folder).encode_prompt(
                [{"role": "user", "content": "Where is your shop?"}]
            )
        ]
    )
    with torch.inference_mode():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-3)


def test_model_folder_is_whole(tuned: Tuned, folder: Path) -> None:
    model = tuned.run.path / tuned.model.path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model / name).read_bytes() == (folder / name).read_bytes()
    chat = ChatFormat.from_folder(model)
    generation = json.loads((model / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == list(chat.stop_token_ids)
    assert chat.control_id("<|end|>") in chat.stop_token_ids


def test_run_folder_holds_nothing_else(tuned: Tuned) -> None:
    found = {p.relative_to(tuned.run.path).as_posix() for p in tuned.run.path.rglob("*")}
    assert {name for name in found if name.startswith("finetune/")} == {"finetune/loss.jsonl"}
    assert {name for name in found if name.startswith("adapter/")} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/phi3.json",
    }
    assert not [name for name in found if "/." in name or name.startswith(".")]


def test_loss_log_and_progress(tuned: Tuned) -> None:
    text = (tuned.run.path / tuned.model.loss_log).read_text("utf-8")
    log = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in log] == list(range(1, tuned.model.steps + 1))
    assert log[-1]["loss"] < 0.2 < log[0]["loss"]
    trained = [step for step in tuned.steps if "loss" in step[2]]
    assert trained[-1][:2] == (tuned.model.steps, tuned.model.steps)
    asked = [step for step in tuned.steps if "model" in step[2]]
    assert asked[-1][0] == asked[-1][1]


def test_choices_carry_their_reasons(tuned: Tuned) -> None:
    assert tuned.model.settings["dtype"] == "float32"
    assert any(choice.startswith("float32: ") for choice in tuned.model.choices)
    assert any(choice.startswith("torch threads: 1") for choice in tuned.model.choices)


def test_libraries_say_nothing(tuned: Tuned) -> None:
    assert tuned.warned == []


def test_full_fine_tuning_trains_all_weights(folder: Path, tmp_path: Path) -> None:
    recipe, run = a_run(tmp_path, folder, method="full", learning_rate=3e-3)
    manifest = finetune(recipe, run)
    assert manifest.trained_parameters == manifest.parameters
    assert manifest.adapter is None
    assert not (run.path / "adapter").exists()
    assert ask(run.path / "model", list(NEW)) == list(NEW.values())


def test_half_precision_goes_through_trl_s_own_loss(folder: Path, tmp_path: Path) -> None:
    recipe, run = a_run(tmp_path, folder, num_train_epochs=3)
    section = recipe.model.model_copy(update={"dtype": "bfloat16"})
    manifest = finetune(recipe.model_copy(update={"model": section}), run)
    assert manifest.choices[0] == "bfloat16: as the recipe says"
    assert manifest.final_loss < manifest.first_loss
    merged = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert merged.dtype == torch.bfloat16


def test_float16_without_a_gpu_is_float32_with_the_reason(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    section = tuned.recipe.model.model_copy(update={"dtype": "float16"})
    runtime = choose_runtime(tuned.recipe.model_copy(update={"model": section}), 10**9)
    assert runtime.dtype == "float32"
    assert "needs a GPU" in runtime.choices[0]
    assert "torch's default" in runtime.choices[1]


def test_layers_that_do_not_exist_are_refused(folder: Path, tmp_path: Path) -> None:
    recipe, run = a_run(tmp_path, folder, target_modules=["no_such_layer"])
    with pytest.raises(StageError, match=r"finetune\.target_modules"):
        finetune(recipe, run)
    assert not (run.path / "model").exists()


def test_answers_too_long_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    recipe, run = a_run(tmp_path, folder)
    write_chats(run.path / "data" / "train.jsonl", {"Tell me?": "word " * 300})
    with pytest.raises(StageError, match=r"cut-answer .*\n.*data/train\.jsonl:1 \('Tell me\?'\)"):
        finetune(recipe, run)
    assert not (run.path / "model").exists()


def test_a_loss_that_is_no_number_saves_nothing(folder: Path, tmp_path: Path) -> None:
    recipe, run = a_run(tmp_path, folder, method="full", learning_rate=1.0, num_train_epochs=2)
    weights = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        weights.lm_head.weight.fill_(float("nan"))
    broken = tmp_path / "broken"
    weights.save_pretrained(broken)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken / name).write_bytes((folder / name).read_bytes())
    run.write(BaseManifest(path=str(broken)))
    with pytest.raises(StageError, match="became NaN"):
        finetune(recipe, run)
    assert not (run.path / "model").exists()


def test_evaluation_takes_rows_evenly(tuned: Tuned) -> None:
    metrics = evaluated(tuned.recipe, tuned.run, max_rows=3)
    assert {part: figures["rows"] for part, figures in metrics.after.items()} == {
        "validation": 3,
        "train": 3,
        "replay": 3,
    }
    rows = (tuned.run.path / metrics.rows).read_text("utf-8").splitlines()
    lines = [row["line"] for row in map(json.loads, rows) if row["part"] == "replay"]
    assert lines == [1, 1 + len(KNOWN) // 3, 1 + 2 * len(KNOWN) // 3]


def test_prompts_without_room_for_an_answer_count_as_wrong(tuned: Tuned, tmp_path: Path) -> None:
    shutil.copytree(tuned.run.path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    write_chats(run.path / "data" / "validation.jsonl", {"word " * 300: "Hello hiker!"})
    metrics = evaluated(tuned.recipe, run, max_rows=2)
    assert metrics.after["validation"]["rows"] == 1
    assert metrics.after["validation"]["correct"] == 0
    assert metrics.after["train"]["correct"] == 2
    remarks = "\n".join(metrics.choices)
    assert "1 questions do not fit the model's context and count as wrong" in remarks
