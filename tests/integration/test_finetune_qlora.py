"""QLoRA really trained: bitsandbytes computes on a CPU too, though `phi3` does not offer that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.integration.finetune_fixture import CHATS, make_base, make_recipe

from phi3_training.finetune.callbacks import LossLog
from phi3_training.finetune.runtime import choose_runtime, quiet_libraries
from phi3_training.finetune.trainer import Rows, make_trainer
from phi3_training.finetune.weights import (
    chat_format,
    load_for_training,
    load_model,
    merge,
    with_adapter,
    write_notes,
)

pytest.importorskip("bitsandbytes", reason='comes with pip install "phi3-promptflow[qlora]"')


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="trained on the GPU there")
def test_adapter_learns_over_four_bits_and_merges_into_whole_weights(
    tmp_path: Path, checkpointing: str
) -> None:
    quiet_libraries()
    base = make_base(tmp_path / "base")
    recipe = make_recipe(
        tmp_path,
        base,
        "finetune.method=qlora",
        "model.dtype=bfloat16",
        f"finetune.gradient_checkpointing={checkpointing}",
        "finetune.num_train_epochs=12",
    )
    runtime = choose_runtime(recipe, 1)
    chat = chat_format(base)
    rows = Rows([chat.encode_example(chats) for chats in CHATS], [], 128, chat.pad_token_id)
    log = LossLog(tmp_path / "loss.jsonl", lambda *_: None)
    model = load_for_training(base, recipe, runtime)
    trainer = make_trainer(model, base, rows, recipe.finetune, runtime, [log], tmp_path / "out")
    assert kinds(trainer.model) == {
        ("Params4bit", torch.uint8, False),
        ("Parameter", torch.bfloat16, False),  # embedding, norms, output matrix
        ("Parameter", torch.bfloat16, True),  # the adapter
    }
    trainer.train()
    assert log.losses[-1] < log.losses[0] - 0.05

    trainer.model.save_pretrained(tmp_path / "adapter")
    write_notes(tmp_path / "adapter", {})
    whole = with_adapter(base, tmp_path / "adapter", torch.float32)
    merge(whole, chat, tmp_path / "merged", base, torch.float32)
    merged = load_model(tmp_path / "merged", torch.float32)
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    ids = torch.tensor([rows.train[0].input_ids])
    with torch.no_grad():
        rounded, exact = trainer.model(ids).logits.float(), merged(ids).logits
        start = load_model(base, torch.float32)(ids).logits
    assert not torch.allclose(exact, start, atol=0.05)  # the adapter is in there
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).min() > 0.95


def kinds(model: torch.nn.Module) -> set[tuple[str, torch.dtype, bool]]:
    return {(type(w).__name__, w.dtype, w.requires_grad) for w in model.parameters()}
