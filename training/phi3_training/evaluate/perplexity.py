"""How probable a model finds the expected answers: negative log likelihood of their tokens.

Perplexity of a set = exp(sum of -ln p(token | all tokens before it) / number of tokens), over the
assistant's tokens and the tokens that end its turns, as training's mask marks them. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..finetune.rows import Conversation
from ..prompt import ChatFormat, Example
from .rows import AnswerLoss

# Rows times width of one forward pass: bounds the logits, which are what fills a GPU in evaluation.
TOKENS_PER_PASS = 4096


def answer_losses(
    model: Any, chat: ChatFormat, conversations: Sequence[Conversation]
) -> list[AnswerLoss | None]:
    """The loss of each conversation's answers; None where it is longer than the context."""
    examples = [chat.encode_example(conversation) for conversation in conversations]
    found: list[AnswerLoss | None] = [None] * len(examples)
    fitting = [i for i, e in enumerate(examples) if len(e.input_ids) <= chat.context_length]
    for batch in _batches(fitting, examples):
        losses = _batch_losses(model, [examples[i] for i in batch], chat.pad_token_id)
        for index, loss in zip(batch, losses, strict=True):
            found[index] = loss
    return found


def _batches(rows: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
    """Rows of like length together, at most so many tokens at a time."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda i: len(examples[i].input_ids)):
        # Sorted: this row is the longest so far, and the others are padded to it.
        if batch and (len(batch) + 1) * len(examples[row].input_ids) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _batch_losses(model: Any, examples: Sequence[Example], pad: int) -> list[AnswerLoss]:
    width = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), width), pad)
    seen = torch.zeros((len(examples), width), dtype=torch.long)
    learnt = torch.zeros((len(examples), width), dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        seen[row, :length] = 1
        learnt[row, :length] = torch.tensor(example.assistant_mask, dtype=torch.bool)
    ids, seen, learnt = ids.to(model.device), seen.to(model.device), learnt.to(model.device)
    logits = model(input_ids=ids, attention_mask=seen).logits
    # The first token follows nothing.
    return marked_losses(logits[:, :-1], ids[:, 1:], learnt[:, 1:])


def marked_losses(
    logits: torch.Tensor, targets: torch.Tensor, marked: torch.Tensor
) -> list[AnswerLoss]:
    """The loss of each row's marked targets.

    `logits` has the shape (rows, positions, vocabulary), the others (rows, positions).
    """
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    # Only the marked positions are raised to float32: the rest is never looked at.
    losses[marked] = torch.nn.functional.cross_entropy(
        logits[marked].float(), targets[marked], reduction="none"
    ).double()
    sums, counts = losses.sum(dim=1).tolist(), marked.sum(dim=1).tolist()
    return [AnswerLoss(nll, int(count)) for nll, count in zip(sums, counts, strict=True)]
