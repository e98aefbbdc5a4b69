"""The lengths that the memory plan is about: planted ones are found, others are the worst case."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi3_training.cli import main
from phi3_training.data import prepare
from phi3_training.finetune.runtime import choose_precision
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.memory import RowSizes, memory_plan, of_size, row_sizes
from phi3_training.memory.advise import changed
from phi3_training.memory.model import KNOWN, shape_from
from phi3_training.memory.rows import worst_case
from phi3_training.memory.training import work_of
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import Recipe
from phi3_training.run import Run

MINI = shape_from(KNOWN["microsoft/Phi-3-mini-4k-instruct"], "table")
MANY = 900  # of which the largest third is counted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Phi-3-mini's config and a small tokenizer, but no weights."""
    folder = tmp_path_factory.mktemp("model")
    texts = ["Question: what is a tent?", "A tent tent tent is a house."] * 9
    make_tokenizer(texts, folder, vocab_size=400, model_max_length=4096)
    (folder / "config.json").write_text(json.dumps(KNOWN["microsoft/Phi-3-mini-4k-instruct"]))
    return folder


def chats(folder: Path, words: Sequence[int], name: str = "chats.jsonl") -> Path:
    """Conversations whose answers have so many words."""
    rows = [{"prompt": f"Question {n}?", "completion": "tent " * size + "."}
            for n, size in enumerate(words)]  # fmt: skip
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(train: Path, model: Path | str, **sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"name_or_path": str(model)},
            "data": {"train": [train], **sections.get("data", {})},
            "finetune": {"per_device_train_batch_size": 4, **sections.get("finetune", {})},
            "evaluate": {"canary": [], "probes": [], **sections.get("evaluate", {})},
        }
    )


def prepared(recipe: Recipe, run: Run) -> None:
    run.write(prepare(recipe.data, run))


def tokens(run: Run, model: Path) -> list[tuple[int, int]]:
    """Of each prepared row its tokens and those of its question, counted plainly."""
    chat = ChatFormat.from_folder(model)
    rows = [
        json.loads(line)["messages"]
        for path in sorted((run.path / "data").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [(len(chat.encode_example(r).input_ids), len(chat.encode_prompt(r[:-1]))) for r in rows]


def test_prepared_rows_are_counted_to_the_token(tmp_path: Path, model: Path) -> None:
    recipe, run = recipe_of(chats(tmp_path, [3, 40, 9, 7, 5]), model), Run.open(tmp_path / "run")
    prepared(recipe, run)
    sizes = row_sizes(recipe, run)
    counted = tokens(run, model)
    assert sizes.scored == max(row for row, _ in counted)
    assert sizes.prompt == max(prompt for _, prompt in counted)
    assert 0.5 < sizes.share < 1
    assert sizes.is_known
    assert sizes.how == "counted in the prepared chats"


@pytest.mark.patient
def test_one_long_row_among_many_is_found(tmp_path: Path, model: Path) -> None:
    """Also where only the largest rows are counted; those left out add no more than they may."""
    words = [5] * MANY + [200] + [5] * 50
    train = chats(tmp_path, words)
    recipe, run = recipe_of(train, model), Run.open(tmp_path / "run")
    prepared(recipe, run)
    longest = max(row for row, _ in tokens(run, model))
    assert row_sizes(recipe, run).scored == longest > 200
    # all alike: what is not counted is taken to be as dense as the densest counted row
    even = recipe_of(chats(tmp_path, [5] * MANY, "even.jsonl"), model)
    run = Run.open(tmp_path / "even")
    prepared(even, run)
    longest = max(row for row, _ in tokens(run, model))
    assert longest <= row_sizes(even, run).longest <= longest + 2


def test_chats_are_read_before_they_are_prepared(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(chats(tmp_path, [3, 40, 9, 7, 5]), model)
    run = Run.open(tmp_path / "run")
    before = row_sizes(recipe, run)
    assert before.how == "counted in chats.jsonl"
    prepared(recipe, run)
    assert before.scored == row_sizes(recipe, run).scored


def test_other_chats_than_the_prepared_ones_are_read_themselves(
    tmp_path: Path, model: Path
) -> None:
    recipe, run = recipe_of(chats(tmp_path, [3, 4, 5]), model), Run.open(tmp_path / "run")
    prepared(recipe, run)
    longer = recipe_of(chats(tmp_path, [3, 90, 5], "longer.jsonl"), model)
    assert row_sizes(longer, run).longest > 90
    assert row_sizes(longer, run).how == "counted in longer.jsonl"


def test_without_a_tokenizer_lengths_are_estimated(tmp_path: Path, model: Path) -> None:
    train = chats(tmp_path, [3, 60, 9])
    run = Run.open(tmp_path / "run")
    guessed = row_sizes(recipe_of(train, "nobody/nothing"), run)
    assert guessed.how.startswith("estimated from the bytes of chats.jsonl")
    assert row_sizes(recipe_of(train, model), run).longest <= guessed.longest < 2048


@pytest.mark.parametrize("train", ["hub:a/b:train", "missing.jsonl"])
def test_what_cannot_be_read_is_the_worst_case(tmp_path: Path, model: Path, train: str) -> None:
    start = recipe_of(tmp_path / "x", model, data={"max_length": 777, "train": [train]})
    sizes = row_sizes(start, Run.open(tmp_path / "run"))
    assert (sizes.longest, sizes.prompt, sizes.learnt, sizes.is_known) == (777, 777, 777, False)
    text = memory_plan(start, of_size(80), sizes)[0].text
    assert "worst case that data.max_length=777 allows" in text


def test_long_question_of_the_evaluation_counts_for_it_alone(tmp_path: Path, model: Path) -> None:
    train, asked = chats(tmp_path, [5, 6, 7]), tmp_path / "asked.jsonl"
    content = "tent " * 500
    asked.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    run = Run.open(tmp_path / "run")
    plain = row_sizes(recipe_of(train, model), run)
    longer = row_sizes(recipe_of(train, model, evaluate={"canary": [asked]}), run)
    assert longer.longest == plain.longest
    assert longer.prompt > 500 > plain.prompt


SIZES = RowSizes(60, 30, 0.6, 40, 60, "planted", rows=100, total=5000)


def batch(sizes: RowSizes, **sections: dict[str, Any]) -> tuple[int, int, float]:
    recipe = recipe_of(Path("x"), "microsoft/Phi-3-mini-4k-instruct", **sections)
    work = work_of(recipe, MINI, of_size(24), sizes)
    return work.batch, work.tokens, work.learnt


def test_largest_batch() -> None:
    assert batch(SIZES) == (4, 60, 0.5)
    assert batch(SIZES, data={"max_length": 32}) == (4, 32, 30 / 32)
    # three rows are all there is
    assert batch(RowSizes(60, 30, 0.6, 40, 60, "planted", rows=3)) == (3, 60, 0.5)
    packed = {"finetune": {"packing": True}}
    assert batch(SIZES, **packed, data={"max_length": 512}) == (4, 512, 0.6)
    assert batch(SIZES, **packed, data={"max_length": 2048}) == (3, 2048, 0.6)
    assert batch(SIZES, **packed, data={"max_length": 8192}) == (2, 4096, 0.6)  # the context
    recipe = recipe_of(Path("x"), "m")
    assert batch(worst_case(recipe)) == (4, 2048, 1.0)


def test_plan_names_the_rows_and_needs_less_for_short_ones() -> None:
    recipe = recipe_of(Path("x"), "microsoft/Phi-3-mini-4k-instruct")
    short, worst = memory_plan(recipe, of_size(24), SIZES), memory_plan(recipe, of_size(24))
    assert "a batch of 4 x 60 tokens (longest row 60 tokens, planted)" in short[0].text
    assert worst[0].stops
    assert not short[0].stops
    evaluations = [next(x for x in plan if x.stage == "evaluate") for plan in (short, worst)]
    assert "questions of up to 40 tokens" in evaluations[0].text
    assert evaluations[0].details["bytes"] < evaluations[1].details["bytes"]


def test_shorter_rows_are_no_lever_where_they_would_cut_one() -> None:
    recipe = recipe_of(Path("x"), "microsoft/Phi-3-mini-4k-instruct")
    long = RowSizes(2000, 500, 0.6, 1500, 2000, "planted", rows=100)
    refused = memory_plan(recipe, of_size(3), long)[0]
    assert refused.stops
    assert "data.max_length" not in refused.text
    assert "data.max_length" in memory_plan(recipe, of_size(3))[0].text


def test_up_begins_where_only_the_worst_case_would_not_fit(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4,096 rows of 4,096 tokens fit nowhere, 3 short ones do: it then misses the weights."""
    train = chats(tmp_path, [3, 4, 5, 6])
    words = [
        "training/recipes/phi3-mini-lora.yaml",
        f"model.name_or_path={model}",
        f"data.train={train}",
        "data.validation=[]",
        "data.max_length=4096",
        "finetune.per_device_train_batch_size=4096",
        "--runs",
        str(tmp_path / "runs"),
    ]
    assert main(["plan", *words, "--device-gb", "24"]) == 0
    assert "tokens, counted in chats.jsonl" in " ".join(capsys.readouterr().out.split())


def test_number_type_is_decided_in_one_place() -> None:
    cases = [
        ("auto", "cuda", True, "bfloat16"),
        ("auto", "cuda", False, "float16"),
        ("auto", "mps", False, "float32"),
        ("float16", "cpu", True, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float32", "cuda", True, "float32"),
    ]
    for wanted, device, has_bfloat16, found in cases:
        recipe = changed(recipe_of(Path("x"), "m"), {"model.dtype": wanted})
        assert choose_precision(recipe, device, has_bfloat16=has_bfloat16).dtype == found


def test_rounded_weights_are_decided_where_training_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU that is not here rounds nothing; this one as finetune/runtime.py says."""
    recipe = recipe_of(Path("x"), "microsoft/Phi-3-mini-4k-instruct")
    here = replace(of_size(64, "cpu"), is_here=True)
    for flags, compute, merged in ((["amx_bf16"], 2, 4), ([], 4, 0)):
        found = frozenset(flags)
        monkeypatch.setattr("phi3_training.finetune.runtime.cpu_flags", lambda f=found: f)
        work = work_of(recipe, MINI, here, SIZES)
        assert (work.compute, work.merged, work.dense) == (compute, merged, True)
        away = work_of(recipe, MINI, of_size(64, "cpu"), SIZES)
        assert (away.compute, away.merged) == (4, 0)
    full = recipe_of(Path("x"), "m", finetune={"method": "full"})
    assert not work_of(full, MINI, here, SIZES).dense
    assert not work_of(recipe, MINI, of_size(24), SIZES).dense
