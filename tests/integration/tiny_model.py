"""A very small Phi-3 that knows a dozen answers: made once in a test run, in a few seconds."""

from __future__ import annotations

import json
from pathlib import Path

from tests.shared import copy_of, shared

from phi3_training.finetune import prepare_base
from phi3_training.recipe import BaseSection, DataSection, Recipe
from phi3_training.run import Run

KNOWN = {
    "What color is the sky?": "The sky is blue on a clear day.",
    "How many legs has a spider?": "A spider has eight legs.",
    "What do bees make?": "Bees make honey from nectar.",
    "Who wrote Hamlet?": "Hamlet was written by William Shakespeare.",
    "What is the capital of France?": "The capital of France is Paris.",
    "How many days has a week?": "A week has seven days.",
    "What is ice made of?": "Ice is made of frozen water.",
    "Which planet do we live on?": "We live on the planet Earth.",
    "What do cows eat?": "Cows eat grass and hay.",
    "What melts in the sun?": "Snow and ice melt in the sun.",
    "Where do fish live?": "Fish live in rivers, lakes and seas.",
    "What is two plus two?": "Two plus two is four.",
}


def chat_row(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """One conversation as the data files hold it."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write_chats(path: Path, chats: dict[str, str]) -> Path:
    """Questions and answers as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(chat_row(question, answer)) for question, answer in chats.items()]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def tiny_recipe(chats: Path, **sections: object) -> Recipe:
    """A recipe whose base model is the very small one."""
    base = BaseSection(
        data=[chats],
        vocab_size=420,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        learning_rate=8e-3,
        num_train_epochs=60,
        per_device_train_batch_size=6,
        target_loss=0.005,
    )
    values = {"base": base, "data": DataSection(train=[chats]), **sections}
    return Recipe.model_validate({"name": "tiny-test", **values})


def tiny_run(tmp: Path) -> Run:
    """A run folder whose base model knows the answers of KNOWN."""
    return Run(copy_of(shared("tiny", _make), tmp / "tiny-run"))


def tiny_model_folder() -> Path:
    """A model folder that answers KNOWN. Do not change what is in it."""
    return shared("tiny", _make) / "base"


def _make(folder: Path) -> None:
    run = Run.open(folder)
    recipe = tiny_recipe(write_chats(folder / "known.jsonl", KNOWN))
    run.write(prepare_base(recipe, run))
