"""The base model of a run: the tiny Phi-3, built and trained here, or existing weights.

Reads the base chats; writes run/base for the tiny model and nothing for other weights.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import read_conversations
from ..manifests import BaseManifest
from ..models.catalogue import known
from ..models.folder import new_folder, write_model
from ..progress import Progress, note
from ..prompt import ChatFormat, Example
from ..recipe import BaseSection, Recipe
from ..run import Run
from .rewordings import with_casual_copies
from .rows import audited, encode_rows
from .runtime import quiet_libraries, torch_threads
from .weights import BEGIN, find_weights, make_tokenizer

if TYPE_CHECKING:
    from transformers import Phi3ForCausalLM


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
    from transformers import Phi3Config, Phi3ForCausalLM

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
        config = Phi3Config(
            vocab_size=size,
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
            torch.manual_seed(base.seed)  # the same random weights each time
            model = Phi3ForCausalLM(config)
        taught = teach(model, examples, base, chat.pad_token_id, progress)
        write_model(model, chat, folder, tokenizer_from=folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    choices = []
    if taught.losses[-1] >= base.target_loss:
        choices.append(
            f"the base model stopped at loss {taught.losses[-1]:.3f}, above base.target_loss "
            f"{base.target_loss}: raise base.num_train_epochs if it does not know its chats"
        )
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
        choices=choices,
    )


# Teaches the tiny Phi-3 from scratch: a plain torch loop on answers only.

_WARMUP_SHARE = 0.05
_FINAL_RATE = 0.05
_MAX_GRADIENT = 1.0


@dataclass(frozen=True)
class Taught:
    """How the teaching went."""

    steps: int
    epochs: int
    losses: list[float]  # mean loss of each epoch


def teach(
    model: Phi3ForCausalLM,
    examples: Sequence[Example],
    base: BaseSection,
    pad: int,
    progress: Progress,
) -> Taught:
    """Train all weights of `model` until its mean loss of an epoch is below `base.target_loss`."""
    order = random.Random(base.seed)  # noqa: S311 - shuffles rows, guards nothing
    size = base.per_device_train_batch_size
    total = math.ceil(len(examples) / size) * base.num_train_epochs
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=base.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )

    def rate(step: int) -> float:
        """Share of the learning rate: a short rise, then a straight line down."""
        warmup = max(1, int(total * _WARMUP_SHARE))
        if step < warmup:
            return (step + 1) / warmup
        return max(_FINAL_RATE, (total - step) / max(1, total - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # Which tokens no chat holds, and which no answer holds.
    unread, unsaid = torch.ones(2, model.config.vocab_size, dtype=torch.bool)
    for example in examples:
        tokens = torch.tensor(example.input_ids)
        unread[tokens] = False
        unsaid[tokens[torch.tensor(example.assistant_mask, dtype=torch.bool)]] = False
    losses: list[float] = []
    step = 0
    model.train()
    for epoch in range(base.num_train_epochs):
        sums = [0.0, 0.0]
        # Rows of similar length together, so that little is spent on padding, then shuffled.
        rows = sorted(examples, key=lambda example: len(example.input_ids) + 4 * order.random())
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        order.shuffle(batches)
        for batch in batches:
            width = max(len(example.input_ids) for example in batch)
            ids = torch.full((len(batch), width), pad)
            labels = torch.full((len(batch), width), -100)  # the next token; -100: nothing
            for row, example in enumerate(batch):
                length = len(example.input_ids)
                tokens = torch.tensor(example.input_ids)
                mask = torch.tensor(example.assistant_mask, dtype=torch.bool)
                ids[row, :length] = tokens
                labels[row, : length - 1] = tokens.masked_fill(~mask, -100)[1:]
            # Padding is on the right, where causal attention never looks, so no mask is needed; and
            # the vocabulary is scored only where something is learnt: both save much time on a CPU.
            # Tokens of no answer are left out: taught only never to come, they would all end up
            # alike, and fine-tuning could not tell them apart any more.
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            learnt = labels != -100
            logits = model.lm_head(hidden[learnt]).masked_fill(unsaid, -torch.inf)
            loss = torch.nn.functional.cross_entropy(logits, labels[learnt])
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            sums = [sums[0] + loss.item(), sums[1] + 1]
            progress(step, total, f"epoch {epoch + 1}, loss {sums[0] / sums[1]:.3f}")
        losses.append(sums[0] / sums[1])
        if losses[-1] < base.target_loss:
            break
    model.eval()
    _resize(model.get_input_embeddings().weight, unread)
    _resize(model.get_output_embeddings().weight, unsaid)
    return Taught(step, len(losses), losses)


@torch.no_grad()
def _resize(weights: Tensor, unknown: Tensor) -> None:
    """Make the vectors of unknown tokens as long as those of the others.

    LoRA leaves these vectors as they are: left as small as they began, fine-tuning could not
    make the model say such a token.
    """
    if unknown.any() and not unknown.all():
        length = weights[~unknown].norm(dim=1).mean()
        weights[unknown] *= length / weights[unknown].norm(dim=1, keepdim=True)
