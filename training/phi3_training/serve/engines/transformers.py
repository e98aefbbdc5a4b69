"""The `transformers` engine: a Hugging Face model folder, on the GPU where there is one.

Reads the model folder. Rows share one left-padded key/value cache; a new answer is read alone
and then joins the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

from ...errors import StageError
from .batch import Logits
from .tokens import TokenEngine

logger = logging.getLogger(__name__)

# Fewer weights than this, and threads cost more than they bring.
_SMALL_MODEL = 50_000_000


def load(model_dir: Path, *, slots: int, num_threads: int | None = None) -> TokenEngine:
    """Load the folder; raises StageError when it holds no model."""
    rows = step_model(model_dir, num_threads)
    return TokenEngine.of_folder("transformers", model_dir, rows, slots=slots)


def step_model(
    model_dir: Path, num_threads: int | None = None, dtype: torch.dtype | None = None
) -> CachedRows:
    """The folder's weights, ready to step; raises StageError when it holds no model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and device.type == "cuda":
        # bf16 needs an Ampere GPU; CPUs without a bf16 unit are many times slower with it.
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    dtype = dtype or torch.float32
    disable_progress_bar()  # "Loading weights" would fill the endpoint's log
    try:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise StageError(
            f"{model_dir} holds no model that can be loaded ({error}); "
            "train it again with: phi3 train"
        ) from None
    if device.type == "cpu":
        small = sum(weight.numel() for weight in model.parameters()) < _SMALL_MODEL
        cores = 1 if small else psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(num_threads or cores)
    logger.info("transformers on %s in %s", device, str(dtype).removeprefix("torch."))
    return CachedRows(model.to(device).eval())


class CachedRows:
    """A step model over one `DynamicCache`, padded on the left; see `batch.StepModel`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._device: torch.device = model.device
        self.reset()

    def has_room(self, length: int) -> bool:  # noqa: ARG002 - the protocol's signature
        """The cache grows as needed; the number of slots is the limit."""
        return True

    def reset(self) -> None:
        """Remove all rows."""
        self._cache = DynamicCache()
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=self._device)

    def add(self, ids: Sequence[int], length: int) -> Logits:  # noqa: ARG002 - see has_room
        """Read the prompt alone, then append its row to the others."""
        prompt = torch.tensor([list(ids)], device=self._device)
        cache, mask = DynamicCache(), torch.ones_like(prompt)
        logits = self._forward(prompt, mask, cache)
        if not self._mask.shape[0]:
            self._cache, self._mask = cache, mask
        else:
            width = max(self._mask.shape[1], mask.shape[1])
            self._mask = torch.cat([pad_left(self._mask, 1, width), pad_left(mask, 1, width)])
            for mine, new in zip(self._cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    both = getattr(mine, name), getattr(new, name)
                    setattr(mine, name, torch.cat([pad_left(states, 2, width) for states in both]))
        row: Logits = logits[0]
        return row

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to every row."""
        column = torch.tensor(tokens, device=self._device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(column)], dim=1)
        return self._forward(column, self._mask, self._cache)

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place. Columns that are padding everywhere go."""
        rows = self._mask.shape[0]
        if rows == 1:
            self.reset()
            return
        rest = list(range(rows - 1))
        if row != rows - 1:
            rest[row] = rows - 1
        self._mask = kept_rows(self._mask, self._cache, rest)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Logits:
        # Given, because padding is on the left: counted from the buffer's start they would be
        # shifted by it, and so would every rotation.
        positions = mask.cumsum(dim=1)[:, -ids.shape[1] :] - 1
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # else prompt tokens x 32,064 floats, of which one row is read
        )
        logits: Logits = output.logits[:, -1].float().cpu().numpy()
        return logits


def pad_left(tensor: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """Zeros in front along `dim` up to `width`."""
    missing = width - tensor.shape[dim]
    return torch.nn.functional.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [missing, 0])


def kept_rows(mask: torch.Tensor, cache: Any, rows: Sequence[int]) -> torch.Tensor:
    """Keep these rows of the cache, in this order, without columns that are padding everywhere.

    The mask of what is left; both are padded on the left, and at least one row is kept.
    """
    mask = mask[rows]
    first = int(mask.argmax(dim=1).min())
    for layer in cache.layers:
        layer.keys = layer.keys[rows][:, :, first:]
        layer.values = layer.values[rows][:, :, first:]
    return mask[:, first:]
