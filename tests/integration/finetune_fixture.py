"""A Phi-3 of a few thousand random weights, and recipes that fine-tune it in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi3_training.data import prepare
from phi3_training.finetune import prepare_base
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.models.folder import write_model
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run

THINGS = ("lamp", "boat", "stove", "tent", "kettle", "drum", "chair", "clock")
CHATS = [
    [
        {"role": "user", "content": f"What does the {thing} cost?"},
        {
            "role": "assistant",
            "content": f"The {thing} costs {10 + n} euros{' and more' * (n % 3)}.",
        },
    ]
    for n, thing in enumerate(THINGS)
]
HELD_OUT = [
    [
        {"role": "user", "content": f"Tell me the price of the {thing}."},
        {"role": "assistant", "content": f"The {thing} costs {10 + n} euros."},
    ]
    for n, thing in enumerate(THINGS[:4])
]


def write_chats(path: Path, chats: list[list[dict[str, str]]]) -> Path:
    """Chats as JSON lines."""
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def make_base(folder: Path) -> Path:
    """A model folder with random weights."""
    texts = [message["content"] for chat in CHATS for message in chat]
    size = make_tokenizer(texts, folder, vocab_size=500, model_max_length=256)
    config = Phi3Config(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=size - 11,
        pad_token_id=size - 11,
    )
    chat = ChatFormat.from_folder(folder)
    torch.manual_seed(0)
    write_model(Phi3ForCausalLM(config), chat, folder, tokenizer_from=folder)
    return folder


def make_recipe(folder: Path, base: Path, *overrides: str) -> Recipe:
    """A recipe for that base and `CHATS`; one batch holds them all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_chats(folder / "chats.jsonl", CHATS)
    write_chats(folder / "held_out.jsonl", HELD_OUT)
    path = folder / "recipe.yaml"
    path.write_text(
        "name: small\n"
        f"model: {{name_or_path: {base}}}\n"
        "data: {train: chats.jsonl, validation: held_out.jsonl, max_length: 128}\n"
        "finetune: {learning_rate: 0.01, num_train_epochs: 3, per_device_train_batch_size: 8,\n"
        "           lora_r: 4, lora_alpha: 8, num_threads: 1}\n"
    )
    return load_recipe(path, overrides)


def make_run(folder: Path, recipe: Recipe) -> Run:
    """A run whose chats and base are ready to be fine-tuned."""
    run = Run.open(folder / "run")
    run.write(prepare(recipe.data, run))
    run.write(prepare_base(recipe, run).model_copy(update={"done_id": "first"}))
    return run


def loss_log(run: Run) -> list[dict[str, Any]]:
    """The lines of run/finetune/loss.jsonl."""
    lines = (run.path / "finetune" / "loss.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
