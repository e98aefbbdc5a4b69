"""Answers of a model folder to many questions at once, greedily: the most likely token each time.

Reads a model folder; writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..finetune.rows import Conversation
from ..finetune.runtime import Runtime
from ..finetune.weights import chat_format, load_model


def answers(
    folder: Path,
    prompts: Sequence[Conversation],
    runtime: Runtime,
    *,
    batch_size: int,
    max_new_tokens: int,
    attention: str | None = None,
    step: Callable[[int], None] = lambda _count: None,
) -> list[str | None]:
    """The model's answer to each conversation that ends with a question.

    None stands for a prompt that leaves no room for an answer in the model's context.
    `step` is told how many more are answered.
    """
    chat = chat_format(folder)
    model = load_model(folder, runtime.torch_dtype, attention).to(runtime.device).eval()
    encoded = [chat.encode_prompt(prompt) for prompt in prompts]
    room = chat.context_length - max_new_tokens
    found: list[str | None] = [None] * len(prompts)
    # Rows of like length together: less padding, the same answers.
    order = sorted(
        (i for i, ids in enumerate(encoded) if len(ids) <= room), key=lambda i: len(encoded[i])
    )
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, mask = _left_padded([encoded[i] for i in batch], chat.pad_token_id)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(runtime.device),
                attention_mask=mask.to(runtime.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=list(chat.stop_token_ids),
                pad_token_id=chat.pad_token_id,
            )
        for index, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            found[index] = chat.decode(row)
        step(len(batch))
    return found


def _left_padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
