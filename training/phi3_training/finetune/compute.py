"""How the loss is computed: TRL's way on a GPU, a shorter one on a CPU, or a loss of one's own."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from .audit import IGNORED
from .dense import DensePhi3
from .layout import layout
from .losses import Loss, LossInput

Batch = dict[str, torch.Tensor]


class CpuTrainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """The same loss, computed only where something is learnt.

    TRL's own loss saves a GPU's memory by scoring every position twice and piece by piece; on a
    CPU that is more than half of the training time of a small model. A Phi-3 with a LoRA adapter
    takes the way of dense.py, other models their own.
    """

    _dense: tuple[DensePhi3 | None] | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Mean cross entropy of the learnt tokens; padding stands on the right, unseen by them."""
        if self._dense is None:
            checkpointing = bool(self.args.activation_checkpointing)
            self._dense = (DensePhi3.of(model, checkpointing=checkpointing),)
        (dense,) = self._dense
        labels = inputs["labels"][:, 1:]
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if dense is not None:
            places = layout(inputs["labels"], inputs.get("position_ids"))
            with torch.autocast("cpu", enabled=False):
                return dense.loss(places, inputs["input_ids"]) / items
        if self.args.bf16:  # as the recipe says, in torch's mixed precision
            loss: torch.Tensor = super().compute_loss(
                model, inputs, num_items_in_batch=num_items_in_batch, **options
            )
            return loss
        return _short_loss(model, inputs, items)


def _short_loss(model: Any, inputs: Batch, items: torch.Tensor | int) -> torch.Tensor:
    """The model's own pass, its vocabulary scored where something is learnt."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    positions = inputs.get("position_ids")
    hidden = plain.base_model(
        input_ids=inputs["input_ids"], position_ids=positions, use_cache=False
    )[0]
    labels = inputs["labels"][:, 1:]
    learnt = labels != IGNORED
    logits = plain.get_output_embeddings()(hidden[:, :-1][learnt]).float()
    return torch.nn.functional.cross_entropy(logits, labels[learnt], reduction="sum") / items


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
