"""A folder like Phi-3-mini's takes the road that `tiny` takes: found, tuned, evaluated, by `phi3`.

Phi-3-mini-4k's own configuration, tokenizer layout and control token ids with random weights; of
its sizes only the layers (2 of 32), hidden_size (384 of 3072) and intermediate_size (1024 of 8192)
are smaller, so that it takes seconds on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.integration.finetune_fixture import CHATS, HELD_OUT, write_chats
from transformers import AutoConfig, Phi3Config, Phi3ForCausalLM

from phi3_training.cli import main
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.prompt import ChatFormat

VOCABULARY = 32000
PHI3_MINI = {
    "vocab_size": 32064,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
SCALED = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as somebody downloads it: bfloat16, three stop tokens."""
    folder = tmp_path_factory.mktemp("phi3-mini")
    texts = [message["content"] for chat in CHATS for message in chat]
    make_tokenizer(texts, folder, vocab_size=600, model_max_length=4096)
    _move_control_tokens(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**PHI3_MINI, **SCALED)).to(torch.bfloat16)
    model.generation_config.eos_token_id = [32000, 32001, 32007]
    model.generation_config.pad_token_id = 32000
    model.save_pretrained(folder)
    return folder


def _move_control_tokens(path: Path) -> None:
    """Fill the vocabulary up to 32000, so that the control tokens get Phi-3's own ids."""
    content = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    size = len(vocabulary)
    vocabulary.update({f"filler{i}": i for i in range(size, VOCABULARY)})
    for token in content["added_tokens"]:
        if token["id"] >= size:
            token["id"] += VOCABULARY - size
    path.write_text(json.dumps(content), "utf-8")


def test_control_tokens_are_phi3s(weights: Path) -> None:
    chat = ChatFormat.from_folder(weights)
    ids = {name: chat.control_id(f"<|{name}|>") for name in ("assistant", "system", "end", "user")}
    assert ids == {"assistant": 32001, "system": 32006, "end": 32007, "user": 32010}
    assert chat.stop_token_ids == (32000, 32001, 32007)
    assert chat.context_length == 4096


def test_found_tuned_and_evaluated(weights: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl", CHATS)
    write_chats(tmp_path / "held_out.jsonl", HELD_OUT)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: mini\n"
        f"model: {{name_or_path: {weights}}}\n"
        "data: {train: chats.jsonl, validation: held_out.jsonl, max_length: 128}\n"
        "finetune: {learning_rate: 1.0e-3, num_train_epochs: 4, per_device_train_batch_size: 1,\n"
        "           gradient_accumulation_steps: 2, lora_r: 8, packing: true,\n"
        "           gradient_checkpointing: true}\n"
        "evaluate: {max_new_tokens: 4, max_rows: 4}\n"
        "gate: {min_gain: [], max_regression: [], max_refusal_change: []}\n"
    )
    runs = tmp_path / "runs"
    assert main(["evaluate", str(recipe), "--runs", str(runs)]) == 0
    made = {
        name: json.loads((runs / "mini" / f"{name}.json").read_text())
        for name in ("base", "model", "metrics")
    }
    assert made["base"]["made"] == "found"
    assert made["base"]["path"] == str(weights)
    assert made["model"]["final_loss"] < made["model"]["first_loss"]
    assert made["model"]["audit"]["allowed_findings"] == {}
    assert made["metrics"]["after"]["validation"]["rows"] == len(HELD_OUT)
    merged = runs / "mini" / "model"
    config = AutoConfig.from_pretrained(merged)
    assert {key: getattr(config, key) for key in PHI3_MINI} == PHI3_MINI
    assert ChatFormat.from_folder(merged).stop_token_ids == (32000, 32001, 32007)
