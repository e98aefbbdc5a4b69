"""Recipes: shipped ones load, faults come all at once, overrides win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training.data import question_of
from phi3_training.errors import RecipeError, StageError
from phi3_training.recipe import load_recipe, save_recipe
from phi3_training.run import Run

PROJECT = Path(__file__).resolve().parents[3]
SHIPPED = PROJECT / "training/recipes/phi3-tiny.yaml"
RECIPES = sorted((PROJECT / "training/recipes").glob("**/*.yaml"))


def write(folder: Path, text: str) -> Path:
    (folder / "chats.jsonl").write_text("", encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_has_its_header(path: Path) -> None:
    header = [line for line in path.read_text("utf-8").splitlines()[:12] if line.startswith("#")]
    for label in ("For:", "Hardware:", "Takes:", "Run:", "Override:"):
        assert any(line.startswith(f"# {label}") for line in header), label


def test_paths_count_from_the_recipe_and_overrides_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "name: a\nmodel: {name_or_path: x}\ndata: {train: chats.jsonl}\n")
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "mine.jsonl").write_text("", encoding="utf-8")
    monkeypatch.chdir(here)

    assert load_recipe(path).data.train == [tmp_path / "chats.jsonl"]
    assert load_recipe(path, ["data.train=mine.jsonl"]).data.train == [here / "mine.jsonl"]


def test_override_reads_scientific_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nmodel: {name_or_path: x}\ndata: {train: chats.jsonl}\n")

    recipe = load_recipe(path, ["finetune.learning_rate=1e-4", "finetune.lora_r=8"])

    assert recipe.finetune.learning_rate == 1e-4
    assert recipe.finetune.lora_r == 8


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "name: a b\ndata: {train: chats.jsonl}\nfinetune: {lora_r: 0, learningrate: 1}\n"
        "serve: {engine: vllm}\n",
    )

    with pytest.raises(RecipeError) as caught:
        load_recipe(path)

    told = str(caught.value)
    for key in ("name:", "finetune.lora_r:", "finetune.learningrate: unknown key", "serve.engine:"):
        assert key in told
    assert len(caught.value.faults) == 4


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nmodel: {name_or_path: x}\ndata: {train: none.jsonl}\n", "no such file"),
        ("name: a\ndata: {train: chats.jsonl}\n", "needs a base: section"),
        ("just words", "expected keys such as"),
        ("a: [", "is not YAML"),
        ("name: a\nmodel: {name_or_path: x}\ndata: {train: []}\n", "data.train"),
        (
            "name: a\nmodel: {name_or_path: x}\ndata: {train: chats.jsonl}\n"
            "serve: {engine: upstream}",
            "upstream_url",
        ),
        (
            "name: a\nmodel: {name_or_path: x}\ndata: {train: chats.jsonl}\n"
            "serve: {cors_origins: [localhost:3000]}",
            r"cors_origins.0: expected an origin such as http://localhost:3000",
        ),
    ],
)
def test_each_fault_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(write(tmp_path, text))


TWISTED = """\
name: a
model: {name_or_path: x}
data:
  train: none.jsonl
  max_length: long
  colour: red
finetune: [lora]
evaluate:
  confidence: 2
gate:
  min_gain:
    metric: luck
serve: {engine: vllm, port: true}
ask: 5
data:
  train: none.jsonl
  max_length: 8
"""


def test_faults_are_reported_in_plain_words_with_their_lines(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, TWISTED), ["finetune=3", "evaluate.seed=-1", "name.x=1"])

    faults = caught.value.faults
    for fault in (
        "data: given twice (lines 3 and 15)",
        "data.max_length: expected 16 or more, got 8 (line 17)",
        "finetune: expected a mapping of keys, got 3",
        "evaluate.confidence: expected less than 1, got 2 (line 9)",
        "evaluate.seed: expected 0 or more, got -1",
        "ask: expected text, got 5 (line 14)",
        "'name.x=1': name is not a section",
        f"data.train: no such file: {tmp_path / 'none.jsonl'}",
    ):
        assert fault in faults
    (metric,) = [fault for fault in faults if fault.startswith("gate.min_gain.0.metric: ")]
    assert metric.startswith("gate.min_gain.0.metric: expected 'exact_match', 'contains'")
    assert metric.endswith("or 'perplexity', got 'luck' (line 12)")
    assert "Input should" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("finetune: [lora]", "finetune: expected a mapping of keys, got a list (line 4)"),
        ("finetune:", "finetune: expected a mapping of keys, got nothing (line 4)"),
        ("serve: {port: x}", "serve.port: expected a whole number, got 'x' (line 4)"),
        ("finetune: {lora_r: 1.5}", "finetune.lora_r: expected a whole number, got 1.5 (line 4)"),
        ("evaluate: {canary: 5}", "evaluate.canary.0: expected a path, got 5 (line 4)"),
        ("finetune:\n  report_to: [paper]", "finetune.report_to.0: expected 'tensorboard' or "
         "'mlflow', got 'paper' (line 5)"),
        ("finetune: {packing: perhaps}", "finetune.packing: expected true or false, got 'perhaps' "
         "(line 4)"),
        ("finetune: {lr: 1}", "finetune.lr: unknown key; did you mean "
         "finetune.learning_rate? (all keys: phi3 recipes --keys) (line 4)"),
        ("finetune: {method: full, adapter: x}", "finetune: method full trains no adapter; remove "
         "adapter, or use lora (line 4)"),
    ],
)  # fmt: skip
def test_each_kind_of_fault_in_plain_words(tmp_path: Path, text: str, told: str) -> None:
    head = "name: a\nmodel: {name_or_path: x}\ndata: {train: chats.jsonl}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, head + text + "\n"))

    assert caught.value.faults == (told,)


def test_wrong_keys_and_missing_files_come_together(tmp_path: Path) -> None:
    """Also those of the section that has the wrong key."""
    text = (
        "name: a\nmodel: {name_or_path: x}\nlora: 1\n"
        "data: {train: none.jsonl, validation: [gone.jsonl], trian: x}\n"
        "evaluate: {canary: away.jsonl, confidence: 2}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))

    told = str(caught.value)
    assert len(caught.value.faults) == 6
    for part in ("lora: unknown key", "data.trian: unknown key", "data.train: no such file",
                 "data.validation: no such file", "evaluate.canary: no such file",
                 "evaluate.confidence: expected"):  # fmt: skip
        assert part in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("name", "expected key.sub=value"),
        ("name.sub=1", "is not a section"),
        ("evaluate.seed=[", "YAML"),
    ],
)
def test_bad_override_is_named(tmp_path: Path, override: str, told: str) -> None:
    path = write(tmp_path, "name: a\nmodel: {name_or_path: x}\ndata: {train: chats.jsonl}\n")

    with pytest.raises(RecipeError, match=told):
        load_recipe(path, [override])


def test_missing_recipe_names_the_list(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="phi3 recipes"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_saved_recipe_reads_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["finetune.learning_rate=1e-4", "ask=Wie geht's?"])

    save_recipe(recipe, tmp_path / "recipe.yaml")

    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_own_chats_are_not_judged_by_the_shops_questions(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("{}\n")
    shipped = load_recipe(SHIPPED)
    assert shipped.data.validation
    assert shipped.ask

    own = load_recipe(SHIPPED, [f"data.train={mine}"])

    assert (own.data.validation, own.ask) == ([], None)
    assert own.data.replay == shipped.data.replay  # what the model knows, whatever the chats

    named = load_recipe(SHIPPED, [f"data.train={mine}", f"data.validation={mine}", "ask=Why?"])
    assert (named.data.validation, named.ask) == ([mine], "Why?")


def test_the_question_is_the_first_that_is_held_out(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "mine")
    recipe = load_recipe(SHIPPED, ["ask=null"])
    with pytest.raises(StageError, match="phi3 data prepare"):
        question_of(recipe, run)
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    run.file("data", "validation.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert question_of(recipe, run) == "user"
    assert question_of(load_recipe(SHIPPED, ["ask=Why?"]), run) == "Why?"
