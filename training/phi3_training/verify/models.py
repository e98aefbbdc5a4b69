"""Loads the models that are compared, and compares merged weights with base plus adapter.

Reads the run's model folders; the only module here that imports torch and safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import StageError
from ..finetune.weights import with_adapter
from ..serve.engines.transformers import CachedRows, step_model


@dataclass(frozen=True)
class Layer:
    """A weight of the merged model: how far it is from base plus adapter (see `Limits`)."""

    name: str
    weights: float
    change: float
    dtype: str


def unmerged(base: Path, adapter: Path) -> Any:
    """The base with the adapter applied, in float32. StageError when the adapter is missing."""
    if not (adapter / "adapter_config.json").is_file():
        raise StageError(
            f"{adapter} is not an adapter (no adapter_config.json), so the merged model cannot be "
            f"compared with it; train again with: phi3 train"
        )
    try:
        model = with_adapter(base, adapter, torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise StageError(f"The adapter in {adapter} cannot be loaded: {error}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def rows_of(model: Any) -> CachedRows:
    """A loaded model, as the engines step it."""
    return CachedRows(model)


def merged_rows(folder: Path) -> CachedRows:
    """A merged model in float32, as the engines step it."""
    return step_model(folder, dtype=torch.float32)


def layers(model: Any, base: Path, merged: Path) -> Iterator[Layer]:
    """Each weight of `merged` compared with `model`, whose adapter is merged here in float32.

    Raises StageError when a weight is missing. `model` is used up.
    """
    # Merged again in float32: what the file holds was rounded to its own type once.
    whole = model.merge_and_unload().state_dict()
    with ExitStack() as stack:
        # The file that contains each weight of a folder: large models are in several.
        before, after = (
            {
                name: file
                for path in sorted(folder.glob("*.safetensors"))
                for file in [stack.enter_context(safe_open(path, framework="pt"))]
                for name in file.keys()  # noqa: SIM118 - no mapping
            }
            for folder in (base, merged)
        )
        for name, weight in whole.items():
            if name in after:
                expected, stored = weight.cpu().float(), after[name].get_tensor(name)
                dtype = str(stored.dtype).removeprefix("torch.")
                if expected.shape != stored.shape:
                    yield Layer(name, float("inf"), float("inf"), dtype)
                    continue
                away, size = float((stored.float() - expected).norm()), float(expected.norm())
                moved = 0.0
                if name in before:
                    moved = float((expected - before[name].get_tensor(name).float()).norm())
                # What is zero, or left alone by the adapter, has no share to be off by.
                change = away / moved if moved else 0.0
                yield Layer(name, away / size if size else away, change, dtype)
            elif not name.startswith("lm_head"):  # that one may be the embedding's
                raise StageError(f"{merged} lacks the weight {name}; train again with: phi3 train")
