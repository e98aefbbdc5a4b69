"""Pluggable losses: functions named by the entry point group `phi3_training.losses`.

A loss takes a `LossInput` and returns what is to become small. Shipped: `contrastive`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ..errors import StageError
from .audit import IGNORED

GROUP = "phi3_training.losses"


@dataclass(frozen=True)
class LossInput:
    """One batch: at each position the model's state, its guess, and the token that came next.

    `items` is how many tokens are learnt in the whole step, over all accumulated batches:
    divide sums by it, so that accumulation changes nothing.
    """

    hidden: Tensor  # batch × position × width: the last layer's states
    logits: Tensor  # batch × position × vocabulary
    labels: Tensor  # batch × position: the next token; IGNORED where nothing is learnt
    items: Tensor | int

    @property
    def learnt(self) -> Tensor:
        """True where the next token is learnt."""
        return self.labels != IGNORED

    def cross_entropy(self) -> Tensor:
        """The usual loss: mean surprise at the learnt tokens."""
        learnt = self.learnt
        scores = self.logits[learnt].float()
        return cross_entropy(scores, self.labels[learnt], reduction="sum") / self.items


Loss = Callable[[LossInput], Tensor]


def find_loss(name: str) -> Loss:
    """The loss of that name; StageError, with the known names, if there is none."""
    entries = entry_points(group=GROUP)
    for entry in entries:
        if entry.name == name:
            try:
                loss: Loss = entry.load()
            except (ImportError, AttributeError) as error:
                raise StageError(
                    f"finetune.loss {name!r} ({entry.value}) cannot be loaded: {error}"
                ) from None
            return loss
    known = ", ".join(sorted({entry.name for entry in entries})) or "none"
    raise StageError(
        f"There is no loss {name!r} (finetune.loss); installed ones: {known}. A package adds one "
        f'by an entry point "{name} = module:function" in the group {GROUP}.'
    )


def contrastive(batch: LossInput, margin: float = 0.5, weight: float = 1.0) -> Tensor:
    """Cross entropy, and a push on states of one answer that are more alike than `margin` allows.

    States that all look alike make a model repeat itself (SimCTG, arXiv 2202.06417).
    """
    total = batch.cross_entropy()
    for states, learnt in zip(batch.hidden, batch.learnt, strict=True):
        unit = normalize(states[learnt].float(), dim=-1)
        count = len(unit)
        if count < 2:
            continue
        alike = unit @ unit.T
        pushes = (margin - 1 + alike).clamp(min=0).sum() - margin * count  # itself: 1, so margin
        total = total + weight * pushes / (count - 1) / batch.items
    return total
