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
from .precision import SMALL_MODEL, Dtype, choose_precision


@dataclass(frozen=True)
class Runtime:
    """The resolved device, number types and threads; `choices` says why, one line each.

    `dtype` and `frozen` are those of precision.py.
    """

    device: str
    dtype: Dtype
    frozen: Dtype
    threads: int
    choices: tuple[str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number type as torch names it."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def torch_frozen(self) -> torch.dtype:
        """The number type of frozen weights as torch names it."""
        return getattr(torch, self.frozen)  # type: ignore[no-any-return]


def choose_runtime(recipe: Recipe, parameters: int, model_type: str = "") -> Runtime:
    """Decide for a model with this many parameters, on this machine; see heap.py for memory.

    `model_type` is that of its config.json; without it nothing is trained faster for its sake.
    """
    here = device()
    precision = choose_precision(
        recipe,
        here,
        has_bfloat16=here == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        parameters=parameters,
        model_type=model_type,
    )
    threads, threads_reason = _threads(recipe.finetune.num_threads, here, parameters)
    choices = [f"{precision.dtype}: {precision.reason}", threads_reason]
    if here == "cpu" and give_back_at_once(parameters):
        choices.append(
            "memory is returned to the system at once: a lower peak for slightly more time"
        )
    frozen = precision.frozen
    if precision.frozen_reason:
        choices.append(f"frozen weights while training: {frozen}: {precision.frozen_reason}")
    return Runtime(here, precision.dtype, frozen, threads, tuple(choices))


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


def _threads(wanted: int | None, device: str, parameters: int) -> tuple[int, str]:
    if wanted is not None:
        return wanted, f"torch threads: {wanted}, as the recipe says"
    if device == "cpu" and parameters < SMALL_MODEL:
        return 1, "torch threads: 1, because the model is too small to gain from more"
    count = torch.get_num_threads()
    return count, f"torch threads: {count}, torch's default on this machine"
