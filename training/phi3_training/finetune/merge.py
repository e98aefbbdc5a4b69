"""Writes what training leaves: the adapter alone, and the whole model with the adapter merged.

Reads the base folder's tokenizer files; replaces the target folder when everything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..models.folder import new_folder, write_model
from ..prompt import ChatFormat
from .adapters import write_notes


def merge(
    model: Any, chat: ChatFormat, target: Path, tokenizer_from: Path, dtype: torch.dtype
) -> None:
    """Write `model` into `target`, its LoRA adapter (if it has one) merged into the weights."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    with new_folder(target) as folder:
        write_model(model.to(dtype), chat, folder, tokenizer_from)


@torch.no_grad()
def scale_adapter(model: Any, weight: float) -> None:
    """Let the adapter add only this share of what it learnt: base + weight x difference.

    Weights between those before and after tuning keep nearly all that was learnt and lose less of
    what the base knew (WiSE-FT, https://arxiv.org/abs/2109.01903).
    """
    if weight == 1.0:
        return
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(weight)


def write_adapter(model: Any, target: Path, notes: dict[str, Any]) -> None:
    """Write the adapter alone into `target`, with our notes on it."""
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        # A model card full of blanks that peft adds; the run's manifests say what this is.
        (folder / "README.md").unlink(missing_ok=True)
        write_notes(folder, notes)
