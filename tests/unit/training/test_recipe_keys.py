"""Every key of a recipe: described, its true default shown, typed as meant, and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_training.cli import main
from phi3_training.errors import RecipeError
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.recipe.keys import keys_of, meant

HEAD = "name: a\nmodel: {name_or_path: x}\ndata: {train: chats.jsonl}\n"
KEYS = keys_of(Recipe)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("", encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(HEAD, encoding="utf-8")
    return recipe


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_no_key_lacks_a_description_or_what_it_may_be() -> None:
    assert len(KEYS) > 150
    assert [key.name for key in KEYS if not key.description or not key.allowed] == []
    assert len({key.name for key in KEYS}) == len(KEYS)


def test_the_shown_default_is_the_one_the_loader_gives(path: Path) -> None:
    base = "base: {data: [chats.jsonl]}\n"
    path.write_text(HEAD + base, encoding="utf-8")
    loaded: Any = load_recipe(path).model_dump(mode="json")
    checked = 0
    for key in KEYS:
        if key.default is None or "[]" in key.name or key.name == "model.name_or_path":
            continue
        value = loaded
        for part in key.name.split("."):
            value = value[part]
        shown = None if key.default == "none" else yaml.safe_load(key.default)
        assert shown == value, key.name
        checked += 1
    assert checked > 140


def test_the_probe_that_waits_ten_minutes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--keys", "-o", "json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["azure.endpoint.liveness_probe.initial_delay"]["default"] == "600"
    assert listed["azure.endpoint.readiness_probe.initial_delay"]["default"] == "30"
    assert listed["finetune.lora_r"]["allowed"] == "whole number, 1 or more"
    assert listed["data.train"]["default"] is None


def test_keys_can_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--keys", "gate.min_gain"]) == 0
    out = capsys.readouterr().out
    assert "gate.min_gain[].metric" in out
    assert "finetune" not in out
    assert main(["recipes", "--keys", "nonesuch"]) == 2


@pytest.mark.parametrize(
    "text",
    ["Is tent #3 cheap?", "Price: 3 or 4?", "3", "yes", "[a] or [b]?", "'quoted'", "{x}", "a: #b"],
)
def test_a_text_is_taken_as_typed(path: Path, text: str) -> None:
    assert load_recipe(path, [f"ask={text}"]).ask == text
    assert load_recipe(path, [f"azure.tags.owner={text}"]).azure.tags == {"owner": text}


def test_a_path_is_taken_as_typed(path: Path, tmp_path: Path) -> None:
    odd = tmp_path / "my chats #2: new.jsonl"
    odd.write_text("", encoding="utf-8")

    recipe = load_recipe(path, [f"data.train={odd.name}", "evaluate.canary=chats.jsonl"])

    assert recipe.data.train == [odd]
    assert recipe.evaluate.canary == [tmp_path / "chats.jsonl"]
    assert load_recipe(path, [f"model.name_or_path={odd}"]).model.name_or_path == str(odd)


def test_what_is_no_text_is_still_yaml(path: Path) -> None:
    recipe = load_recipe(
        path,
        [
            "finetune.report_to=mlflow",
            "finetune.allow=[no-end, cut-answer]",
            "finetune.target_modules=[qkv_proj, o_proj]",
            "gate.min_gain=[]",
            "data.train=[chats.jsonl]",
            "data.validation=[]",
            "model.revision=null",
            "azure.train.parameters={lora_r: 8}",
        ],
    )
    assert recipe.finetune.report_to == ["mlflow"]
    assert recipe.finetune.allow == ["no-end", "cut-answer"]
    assert recipe.finetune.target_modules == ["qkv_proj", "o_proj"]
    assert (recipe.gate.min_gain, recipe.data.validation, recipe.model.revision) == ([], [], None)
    assert recipe.azure.train.parameters == {"lora_r": 8}


def test_a_typo_on_the_command_line_is_not_blamed_on_the_file(path: Path) -> None:
    told = faults(path, "finetune.lora_rank=8", "data.validation=gone.jsonl")
    assert told.startswith("The command line has 2 faults:")
    assert "recipe.yaml" not in told

    together = faults(path, "finetune.method=full", "finetune.adapter=x")
    assert together.startswith("The command line has 1 fault:")

    path.write_text(HEAD + "finetune: {lora_r: 0, seed: x}\n", encoding="utf-8")
    told = faults(path, "finetune.seed=y")
    file, typed = told.split("The command line has 1 fault:")
    assert "recipe.yaml has 1 fault:" in file
    assert "finetune.lora_r" in file
    assert "finetune.seed: expected a whole number, got 'y'" in typed


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("max_seq_length", "data.max_length"),
        ("finetune.max_seq_length", "data.max_length"),
        ("finetune.max_length", "data.max_length"),
        ("epochs", "finetune.num_train_epochs"),
        ("num_train_epochs", "finetune.num_train_epochs"),
        ("finetune.r", "finetune.lora_r"),
        ("lora_alpha", "finetune.lora_alpha"),
        ("finetune.lr", "finetune.learning_rate"),
        ("lr", "finetune.learning_rate"),
        ("batch_size", "finetune.per_device_train_batch_size"),
        ("finetune.learning_rat", "finetune.learning_rate"),
        ("data.trian", "data.train"),
        ("finetun.lora_r", "finetune.lora_r"),
        ("base_model", "model.name_or_path"),
        ("engine", "serve.engine"),
        ("azure.endpoint.instance_typ", "azure.endpoint.instance_type"),
    ],
)
def test_a_wrong_key_offers_the_right_one(path: Path, key: str, right: str) -> None:
    assert right in meant(key, KEYS)
    if "finetun." not in key:
        assert f"did you mean {right}" in faults(path, f"{key}=1")


def test_a_key_like_no_other_offers_nothing() -> None:
    assert meant("xyzzy", KEYS) == []
