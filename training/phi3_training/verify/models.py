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
        before, after = (_tensors(folder, stack) for folder in (base, merged))
        for name, expected in whole.items():
            if name in after:
                was = before[name].get_tensor(name) if name in before else None
                yield _layer(name, expected.cpu(), after[name].get_tensor(name), was)
            elif not name.startswith("lm_head"):  # that one may be the embedding's
                raise StageError(f"{merged} lacks the weight {name}; train again with: phi3 train")


def _tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The file that contains each weight of a folder."""
    files = [
        stack.enter_context(safe_open(path, framework="pt"))
        for path in sorted(folder.glob("*.safetensors"))
    ]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping


def _layer(
    name: str, expected: torch.Tensor, merged: torch.Tensor, before: torch.Tensor | None
) -> Layer:
    dtype = str(merged.dtype).removeprefix("torch.")
    if expected.shape != merged.shape:
        return Layer(name, float("inf"), float("inf"), dtype)
    away = float((merged.float() - expected.float()).norm())
    size = float(expected.float().norm())
    moved = float((expected.float() - before.float()).norm()) if before is not None else 0.0
    return Layer(name, away / size if size else away, away / moved if moved else 0.0, dtype)
