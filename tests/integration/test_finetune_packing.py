"""Packing: masks stay, positions restart, and no conversation sees another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.integration.finetune_fixture import make_base, make_recipe, make_run

from phi3_training.errors import RecipeError
from phi3_training.finetune import finetune
from phi3_training.finetune.audit import IGNORED
from phi3_training.finetune.rows import encode_rows, read_located
from phi3_training.finetune.trainer import PackedCollator, as_packed, pack, packed_rows
from phi3_training.finetune.weights import chat_format, load_model
from phi3_training.prompt import Example

LIMIT = 96


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def examples(base: Path, tmp_path: Path) -> list[Example]:
    run = make_run(tmp_path, make_recipe(tmp_path, base))
    located = read_located(run.path / "data" / "train.jsonl", run.path)
    return [row.example for row in encode_rows(chat_format(base), located)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_the_separate_ones(
    base: Path, examples: list[Example], attention: str
) -> None:
    data = packed_rows(examples, LIMIT)
    assert len(data) < len(examples)
    model = load_model(base, torch.float32, attention).eval()
    batch = PackedCollator(pad_token_id=0)([data[i] for i in range(len(data))])
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        blind = model(input_ids=batch["input_ids"], use_cache=False).logits
    worst = leaked = 0.0
    for number, row in enumerate(data):
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            with torch.no_grad():
                alone = model(torch.tensor([row["input_ids"][part]]), use_cache=False).logits[0]
            worst = max(worst, float((packed[number, part] - alone).abs().max()))
            leaked = max(leaked, float((blind[number, part] - alone).abs().max()))
            start += length
    assert worst < 1e-4
    assert leaked > 1e-3  # without positions they do see each other: the test can fail


def test_masks_and_tokens_survive(examples: list[Example]) -> None:
    data = packed_rows(examples, LIMIT)
    before = sorted((e.input_ids, e.assistant_mask) for e in examples)
    batch = PackedCollator(pad_token_id=0)([data[i] for i in range(len(data))])
    after = []
    for number, row in enumerate(data):
        for piece in as_packed(row, batch, number).pieces():
            mask = [int(label != IGNORED) for label in piece.labels]
            after.append((list(piece.input_ids), mask))
    assert sorted(after) == before
    learnt = int((batch["labels"] != IGNORED).sum())
    assert learnt == sum(sum(e.assistant_mask) for e in examples)


def test_padding_is_learnt_by_nobody(examples: list[Example]) -> None:
    data = packed_rows(examples, LIMIT)
    batch = PackedCollator(pad_token_id=7)([data[i] for i in range(len(data))])
    for number, row in enumerate(data):
        size = len(row["input_ids"])
        assert set(batch["labels"][number, size:].tolist()) <= {IGNORED}
        assert batch["position_ids"][number, size:].tolist() == list(
            range(batch["input_ids"].shape[1] - size)
        )


@pytest.mark.parametrize(
    ("lengths", "size"), [([5, 9, 17, 3, 30, 12], 32), ([10] * 7, 10), ([1], 5), ([3] * 50, 31)]
)
def test_bins_hold_every_row_once_and_never_too_much(lengths: list[int], size: int) -> None:
    bins = pack(lengths, size)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin_) <= size for bin_ in bins)
    assert len(bins) <= 1.5 * -(-sum(lengths) // size) + 1


def test_a_packed_training_learns_the_same(base: Path, tmp_path: Path) -> None:
    manifests = []
    for name, options in {
        "plain": [],
        "packed": ["finetune.packing=true", f"data.max_length={LIMIT}"],
    }.items():
        recipe = make_recipe(tmp_path / name, base, *options)
        manifests.append(finetune(recipe, make_run(tmp_path / name, recipe)))
    plain, packed = manifests
    for key in ("learnt_tokens", "tokens", "steps"):
        assert getattr(packed, key) == getattr(plain, key)
    for key in ("first_loss", "final_loss"):
        assert getattr(packed, key) == pytest.approx(getattr(plain, key), abs=1e-4)


def test_flash_attention_packs_one_row_at_a_time(base: Path, tmp_path: Path) -> None:
    flash = ("model.attn_implementation=flash_attention_2", "finetune.packing=true")
    with pytest.raises(RecipeError, match="per_device_train_batch_size=1"):
        make_recipe(tmp_path, base, *flash)
    make_recipe(tmp_path, base, *flash, "finetune.per_device_train_batch_size=1")
