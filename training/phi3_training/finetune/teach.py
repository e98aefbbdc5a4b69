"""Teaches the tiny Phi-3 from scratch: a plain torch loop on answers only.

Reads encoded conversations; changes the model it is given.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..progress import Progress
from ..prompt import Example
from ..recipe import BaseSection

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
    model: Any, examples: Sequence[Example], base: BaseSection, pad: int, progress: Progress
) -> Taught:
    """Train all weights of `model` until its mean loss of an epoch is below `base.target_loss`."""
    order = random.Random(base.seed)  # noqa: S311 - shuffles rows, guards nothing
    batches_per_epoch = math.ceil(len(examples) / base.per_device_train_batch_size)
    total = batches_per_epoch * base.num_train_epochs
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=base.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
    unread, unsaid = _unknown_tokens(examples, model.config.vocab_size)
    losses: list[float] = []
    step = 0
    model.train()
    for epoch in range(base.num_train_epochs):
        sums = [0.0, 0.0]
        for batch in _batches(examples, base.per_device_train_batch_size, order):
            width = max(len(example.input_ids) for example in batch)
            ids = torch.full((len(batch), width), pad)
            labels = torch.full((len(batch), width), -100)  # the next token; -100: nothing
            for row, example in enumerate(batch):
                length = len(example.input_ids)
                tokens = torch.tensor(example.input_ids)
                mask = torch.tensor(example.assistant_mask, dtype=torch.bool)
                ids[row, :length] = tokens
                labels[row, : length - 1] = tokens.masked_fill(~mask, -100)[1:]
            # Padding is on the right, where causal attention never looks, so no mask is needed;
            # and the vocabulary is scored only where something is learnt. Both save much time on
            # a CPU. Tokens of no answer are left out: taught only never to come, they would all
            # end up alike, and fine-tuning could not tell them apart any more.
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


def _rate(step: int, total: int) -> float:
    """Share of the learning rate: a short rise, then a straight line down."""
    warmup = max(1, int(total * _WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return max(_FINAL_RATE, (total - step) / max(1, total - warmup))


def _batches(
    examples: Sequence[Example], size: int, order: random.Random
) -> Iterator[list[Example]]:
    """Shuffled batches of rows of similar length, so that little is spent on padding."""
    rows = sorted(examples, key=lambda example: len(example.input_ids) + 4 * order.random())
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    order.shuffle(batches)
    yield from batches


def _unknown_tokens(examples: Sequence[Example], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Which tokens no chat holds, and which no answer holds."""
    unread, unsaid = torch.ones(2, vocab_size, dtype=torch.bool)
    for example in examples:
        tokens = torch.tensor(example.input_ids)
        unread[tokens] = False
        unsaid[tokens[torch.tensor(example.assistant_mask, dtype=torch.bool)]] = False
    return unread, unsaid


@torch.no_grad()
def _resize(weights: Tensor, unknown: Tensor) -> None:
    """Make the vectors of unknown tokens as long as those of the others.

    LoRA leaves these vectors as they are: left as small as they began, fine-tuning could not
    make the model say such a token.
    """
    if unknown.any() and not unknown.all():
        length = weights[~unknown].norm(dim=1).mean()
        weights[unknown] *= length / weights[unknown].norm(dim=1, keepdim=True)
