"""How the loss is computed: TRL's way on a GPU, a shorter one on a CPU, or a loss of one's own."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from .audit import IGNORED
from .losses import Loss, LossInput

Batch = dict[str, torch.Tensor]


class CpuTrainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """The same loss, scored only where something is learnt.

    TRL's own loss saves a GPU's memory by scoring every position twice and piece by piece; on a
    CPU that is more than half of the training time of a small model.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | None = None,
        **_options: Any,
    ) -> torch.Tensor:
        """Mean cross entropy of the learnt tokens; padding stands on the right, unseen by them."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        positions = inputs.get("position_ids")
        hidden = plain.base_model(
            input_ids=inputs["input_ids"], position_ids=positions, use_cache=False
        )[0]
        labels = inputs["labels"][:, 1:]
        learnt = labels != IGNORED
        logits = plain.get_output_embeddings()(hidden[:, :-1][learnt])
        loss = torch.nn.functional.cross_entropy(logits, labels[learnt], reduction="sum")
        return loss / (learnt.sum() if num_items_in_batch is None else num_items_in_batch)


class OwnLossTrainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """Learns by a loss of the entry point group; set `own_loss` before training."""

    own_loss: Loss

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | None = None,
        **_options: Any,
    ) -> torch.Tensor:
        """What the loss says of the model's states and scores."""
        seen = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**seen, use_cache=False, output_hidden_states=True)
        labels = inputs["labels"][:, 1:]
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        hidden, logits = outputs.hidden_states[-1][:, :-1], outputs.logits[:, :-1]
        loss = self.own_loss(LossInput(hidden, logits, labels, items))
        # `items` counts the tokens of all processes, whose gradients are averaged.
        shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return loss * self.accelerator.num_processes if shared else loss
