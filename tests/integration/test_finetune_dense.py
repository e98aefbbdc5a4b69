"""The fast way of a LoRA on a CPU computes what TRL computes: the same losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.integration.finetune_fixture import make_base, make_recipe, make_run
from transformers import Phi3Config, Phi3ForCausalLM
from trl import SFTTrainer

from phi3_training.finetune.audit import IGNORED
from phi3_training.finetune.dense import ROUND, DensePhi3, layouts
from phi3_training.finetune.rows import encode_rows, read_located
from phi3_training.finetune.runtime import Runtime
from phi3_training.finetune.trainer import CpuTrainer, Rows, make_trainer
from phi3_training.finetune.weights import chat_format, load_for_training

LENGTHS = (23, 9, 21, 14, 9, 2)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_key_value_heads": 2},
    "sliding window": {"sliding_window": 8},
    "tied": {"tie_word_embeddings": True},
    "partial rotary": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
        }
    },
}


def make_model(dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """A small Phi-3 with an adapter that changes what it says."""
    config = Phi3Config(
        **{
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "pad_token_id": 0,
            "attn_implementation": "sdpa",
            **shape,
        }
    )
    torch.manual_seed(1)
    model = Phi3ForCausalLM(config).to(dtype)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapter)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapted.train()


def make_batch(lengths: Sequence[int] = LENGTHS) -> dict[str, torch.Tensor]:
    """Rows of random tokens, padded on the right; about half of each is learnt."""
    torch.manual_seed(2)
    ids = torch.randint(1, 300, (len(lengths), max(lengths)))
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for number, length in enumerate(lengths):
        labels[number, length // 2 : length] = ids[number, length // 2 : length]
        mask[number, :length] = 1
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def learnt_by(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [w for w in model.parameters() if w.requires_grad]))


def dense_loss(
    model: Any, batch: dict[str, torch.Tensor], at_once: int = 1024, **options: bool
) -> torch.Tensor:
    dense = DensePhi3.of(model, **options)
    assert dense is not None
    parts = layouts(batch["labels"], batch.get("position_ids"), at_once)
    total: Any = sum(dense.loss(part, batch["input_ids"]) for part in parts)
    return total / (batch["labels"][:, 1:] != IGNORED).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("at_once", [1024, 25])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_the_models_own(
    shape: str, at_once: int, checkpointing: bool
) -> None:
    model, batch = make_model(**SHAPES[shape]), make_batch()
    expected = model(**batch).loss
    found = dense_loss(model, batch, at_once, checkpointing=checkpointing)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    pairs = zip(learnt_by(model, found), learnt_by(model, expected), strict=True)
    assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-4


def test_tokens_that_fill_up_are_as_many_as_the_longest_row_has() -> None:
    model, batch = make_model(), make_batch((30, 25, 25, 23))
    (places,) = layouts(batch["labels"])
    assert len(places.taken) - (29 + 24 + 24 + 22) == 29
    assert dense_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)


def test_bfloat16_weights_change_the_loss_by_their_rounding_only() -> None:
    """Held against float32 over the rounded weights: what is left is the products' rounding."""
    rounded = make_model(torch.bfloat16)
    exact = make_model()
    exact.load_state_dict({k: v.float() for k, v in rounded.state_dict().items()})
    batch = make_batch()
    found, expected = dense_loss(rounded, batch), dense_loss(exact, batch)
    assert found.item() == pytest.approx(expected.item(), abs=5e-3)
    for a, b in zip(learnt_by(rounded, found), learnt_by(exact, expected), strict=True):
        assert a.dtype == torch.float32
        assert float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > 0.999


def test_dropout_hides_inputs_from_the_adapter_alone() -> None:
    model, batch = make_model(), make_batch()
    still = dense_loss(model, batch).item()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    torch.manual_seed(3)
    first, second = dense_loss(model, batch), dense_loss(model, batch)
    assert first.item() != second.item()
    assert first.item() == pytest.approx(still, abs=0.5)
    torch.manual_seed(3)
    again = dense_loss(model, batch)
    assert again.item() == first.item()
    for a, b in zip(learnt_by(model, first), learnt_by(model, again), strict=True):
        assert torch.equal(a, b)
    assert dense_loss(model.eval(), batch).item() == pytest.approx(still, abs=1e-5)


def test_only_learnt_tokens_and_what_they_see_are_computed() -> None:
    batch = make_batch()
    batch["labels"][1] = IGNORED  # teaches nothing
    batch["labels"][2, 15:] = IGNORED  # learns up to its fifteenth token
    (places,) = layouts(batch["labels"])
    computed = sum(n - 1 for n in LENGTHS) - 8 - 6
    assert len(places.taken) == -(-computed // ROUND) * ROUND
    spans = [block.end - block.start for block in places.blocks]
    assert sum(spans) == len(places.taken)
    model = make_model()
    assert dense_loss(model, batch).item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)


def test_other_models_go_their_own_way() -> None:
    assert DensePhi3.of(make_model(attn_implementation="eager")) is None
    whole = make_model().unload()
    whole.requires_grad_(True)
    assert DensePhi3.of(whole) is None
    switched_off = make_model()
    switched_off.disable_adapter_layers()
    assert DensePhi3.of(switched_off) is None


def make_cpu_trainer(folder: Path, *options: str) -> CpuTrainer:
    """A trainer of the product on a tiny base, its adapter already away from zero."""
    base = make_base(folder / "base")
    recipe = make_recipe(folder, base, *options)
    run = make_run(folder, recipe)
    located = read_located(run.path / "data" / "train.jsonl", run.path)
    chat = chat_format(base)
    examples = [row.example for row in encode_rows(chat, located)]
    rows = Rows(examples, [], 96, chat.pad_token_id)
    runtime = Runtime("cpu", "float32", "float32", 1, ())
    model = load_for_training(base, recipe, runtime)
    trainer = make_trainer(model, base, rows, recipe.finetune, runtime, [], folder / "out")
    assert type(trainer) is CpuTrainer
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return trainer


@pytest.mark.parametrize("packing", ["false", "true"])
def test_every_batch_of_a_training_costs_what_trl_says(packing: str, tmp_path: Path) -> None:
    """The batches that the trainer feeds, by our loss and by the one that TRL has for them."""
    options = [f"finetune.packing={packing}", "finetune.per_device_train_batch_size=3"]
    trainer = make_cpu_trainer(tmp_path, *options)
    adapted = trainer.model
    batches = list(trainer.get_train_dataloader())
    assert len(batches) > 1 or packing == "true"
    for batch in batches:
        items = (batch["labels"][:, 1:] != IGNORED).sum()
        ours = trainer.compute_loss(adapted, dict(batch), num_items_in_batch=items)
        theirs = SFTTrainer.compute_loss(trainer, adapted, dict(batch), num_items_in_batch=items)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)
        pairs = zip(learnt_by(adapted, ours), learnt_by(adapted, theirs), strict=True)
        assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-3


def test_a_large_batch_is_computed_in_parts_with_the_same_gradients(tmp_path: Path) -> None:
    trainer = make_cpu_trainer(tmp_path, "finetune.packing=false")
    batch = {name: rows.repeat(16, 1) for name, rows in make_batch().items()}
    assert len(layouts(batch["labels"])) > 1
    items = (batch["labels"][:, 1:] != IGNORED).sum()
    theirs = SFTTrainer.compute_loss(trainer, trainer.model, batch, num_items_in_batch=items)
    expected = learnt_by(trainer.model, theirs)
    trainer.model.zero_grad()
    ours = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)
    learning = [w.grad for w in trainer.model.parameters() if w.requires_grad]
    pairs = zip(learning, expected, strict=True)
    assert max(float((a - b).norm() / b.norm()) for a, b in pairs) < 1e-3
