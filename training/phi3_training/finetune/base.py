"""The base model of a run: the tiny Phi-3, built and trained here, or existing weights.

Reads the base chats; writes run/base for the tiny model and nothing for other weights.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from ..data import read_conversations
from ..manifests import BaseManifest
from ..models.catalogue import known
from ..models.folder import new_folder, write_model
from ..progress import Progress, note
from ..prompt import ChatFormat
from ..recipe import BaseSection, Recipe
from ..run import Run
from .rewordings import with_casual_copies
from .rows import audited, encode_rows
from .runtime import quiet_libraries, torch_threads
from .teach import Taught, teach
from .weights import BEGIN, find_weights, make_tokenizer


def prepare_base(recipe: Recipe, run: Run, progress: Progress) -> BaseManifest:
    """Make or find the base model; the manifest with its `path`.

    Raises StageError when weights are not there or when the base chats cannot be learnt from,
    and DataError when they have faults.
    """
    quiet_libraries()
    if recipe.base is not None and recipe.model.is_tiny:
        return _make_tiny(recipe, recipe.base, run, progress)
    note(progress, f"looking for {recipe.model.name_or_path}")
    folder = find_weights(recipe.model, progress)
    name = known(recipe.model.name_or_path)
    what = f"{name.what}, licence {name.license}; " if name is not None else ""
    return BaseManifest(
        path=str(folder),
        made="found",
        summary=f"{recipe.model.name_or_path}: {what}{folder}",
        settings={"name_or_path": recipe.model.name_or_path, "revision": recipe.model.revision},
        choices=[],
    )


def _make_tiny(recipe: Recipe, base: BaseSection, run: Run, progress: Progress) -> BaseManifest:
    started = time.process_time()
    rows = [
        (f"{chats.source.name}:{chats.line}", [message.to_dict() for message in chats.messages])
        for chats in read_conversations(base.data)
    ]
    rows = with_casual_copies(rows) if recipe.data.casual_copies else rows
    with new_folder(run.path / "base") as folder, torch_threads(1):
        texts = [message["content"] for _, row in rows for message in row]
        size = make_tokenizer(
            texts,
            folder,
            vocab_size=base.vocab_size,
            model_max_length=base.max_position_embeddings,
        )
        chat = ChatFormat.from_folder(folder)
        encoded = encode_rows(chat, rows)
        checked, _ = audited(chat, encoded, base.max_position_embeddings, allow=None)
        examples = [row.example for row in checked]
        model = _new_model(base, size, chat)
        taught = teach(model, examples, base, chat.pad_token_id, progress)
        write_model(model, chat, folder, tokenizer_from=folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    return BaseManifest(
        path="base",
        made="taught",
        summary=f"tiny Phi-3, {parameters / 1e6:.2f} M weights, loss {taught.losses[-1]:.3f} "
        f"after {taught.epochs} epochs of {len(rows)} conversations",
        parameters=parameters,
        conversations=len(rows),
        tokens=sum(len(example.input_ids) for example in examples),
        learnt_tokens=sum(sum(example.assistant_mask) for example in examples),
        losses=[round(loss, 5) for loss in taught.losses],
        steps=taught.steps,
        cpu_seconds=round(time.process_time() - started, 3),
        settings={**base.model_dump(mode="json", exclude={"data"}), "vocab_size": size},
        choices=_choices(base, taught),
    )


def _new_model(base: BaseSection, vocab_size: int, chat: ChatFormat) -> Any:
    """A Phi-3 with random weights; the seed makes it the same each time."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=vocab_size,
        hidden_size=base.hidden_size,
        intermediate_size=base.intermediate_size,
        num_hidden_layers=base.num_hidden_layers,
        num_attention_heads=base.num_attention_heads,
        num_key_value_heads=base.num_attention_heads,
        max_position_embeddings=base.max_position_embeddings,
        original_max_position_embeddings=base.max_position_embeddings,
        bos_token_id=chat.control_id(BEGIN),
        eos_token_id=chat.pad_token_id,
        pad_token_id=chat.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        return Phi3ForCausalLM(config)


def _choices(base: BaseSection, taught: Taught) -> list[str]:
    if taught.losses[-1] < base.target_loss:
        return []
    return [
        f"the base model stopped at loss {taught.losses[-1]:.3f}, above base.target_loss "
        f"{base.target_loss}: raise base.num_train_epochs if it does not know its chats"
    ]
