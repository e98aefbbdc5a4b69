"""Where training runs and how: device, number type, threads, each with its reason; quiet libraries.

Reads the recipe and what torch sees of this machine; writes nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..recipe import Recipe
from .heap import give_back_at_once
from .precision import SMALL_MODEL, Dtype, choose_dtype, cpu_frozen_dtype


@dataclass(frozen=True)
class Runtime:
    """The resolved device, number types and threads; `choices` says why, one line each.

    `dtype` is what the model is in before and after training, `rounded` what its weights are in
    while only an adapter learns, where a CPU trains faster so (see precision.py).
    """

    device: str
    dtype: Dtype
    threads: int
    choices: tuple[str, ...]
    rounded: Dtype | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number type as torch names it."""
        return _torch(self.dtype)

    @property
    def frozen(self) -> Dtype:
        """The number type of the weights while an adapter learns."""
        return self.rounded or self.dtype

    @property
    def torch_frozen(self) -> torch.dtype:
        """The number type of frozen weights as torch names it."""
        return _torch(self.frozen)


def choose_runtime(recipe: Recipe, parameters: int, model_type: str = "") -> Runtime:
    """Decide for a model with this many parameters, on this machine; see heap.py for memory.

    `model_type` is that of its config.json; without it nothing is trained faster for its sake.
    """
    here = device()
    dtype, dtype_reason = choose_dtype(recipe.model.dtype, here, has_bfloat16=_has_bfloat16(here))
    threads, threads_reason = _threads(recipe.finetune.num_threads, here, parameters)
    choices = [f"{dtype}: {dtype_reason}", threads_reason]
    if here == "cpu" and give_back_at_once(parameters):
        choices.append(
            "memory is returned to the system at once: a lower peak for slightly more time"
        )
    rounded = None
    if here == "cpu" and dtype == "float32" and model_type:
        rounded, reason = cpu_frozen_dtype(recipe, parameters, model_type)
        choices.append(f"frozen weights while training: {rounded}: {reason}")
    return Runtime(here, dtype, threads, tuple(choices), rounded)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_main_process() -> bool:
    """Whether this process writes the files: one of several does (see launch.py)."""
    return os.environ.get("RANK", "0") == "0"


def quiet_libraries() -> None:
    """Switch off the libraries' progress bars and advice; phi3 shows its own progress.

    Errors are not touched, nor is the Hub's download bar: it is the only sign of life there.
    """
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # peft reads a name that transformers is about to drop; no user can fix that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def device() -> str:
    """The kind of device that trains: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _torch(dtype: Dtype) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _has_bfloat16(device: str) -> bool:
    return device == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _threads(wanted: int | None, device: str, parameters: int) -> tuple[int, str]:
    if wanted is not None:
        return wanted, f"torch threads: {wanted}, as the recipe says"
    if device == "cpu" and parameters < SMALL_MODEL:
        return 1, "torch threads: 1, because the model is too small to gain from more"
    count = torch.get_num_threads()
    return count, f"torch threads: {count}, torch's default on this machine"
