"""How a training uses this machine, each choice with its reason: number type, threads, memory.

Also asked by the memory plan, so torch is imported inside the functions that need it. Reads the
recipe, the load, and what the CPU and torch can do; writes nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..recipe import Recipe

if TYPE_CHECKING:
    import torch

# Which numbers a training computes in: one decision for the training and the memory plan.

Dtype = Literal["float32", "bfloat16", "float16"]

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# Below it a step is bound by calls rather than by products, and float32 costs nothing.
SMALL_MODEL = 50_000_000
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Precision:
    """The number types of a training, with the reasons.

    `dtype` is what the model is in before and after it, `frozen` what its weights are in while
    only an adapter learns, where a CPU trains faster so.
    """

    dtype: Dtype
    reason: str
    frozen: Dtype
    frozen_reason: str | None = None


def choose_precision(
    recipe: Recipe,
    device: str,
    *,
    has_bfloat16: bool,
    parameters: int = 0,
    model_type: str = "",
    flags: frozenset[str] | None = None,
) -> Precision:
    """Decide for a kind of device and a model.

    `has_bfloat16`: whether a GPU multiplies bfloat16 in hardware. `model_type` is that of the
    model's config.json; without it nothing is rounded. `flags` are the CPU's features, those of
    this machine unless given.
    """
    wanted, reason = recipe.model.dtype, "as the recipe says"
    dtype: Dtype = "float32"
    if wanted == "auto" and device == "cuda":
        dtype = "bfloat16" if has_bfloat16 else "float16"
        reason = "the GPU supports it" if has_bfloat16 else "the GPU has no bfloat16"
    elif wanted == "auto":
        reason = f"exact, and the fastest on a {device}"
    elif wanted == "float16" and device == "cpu":
        reason = "the recipe sets float16, which needs a GPU"
    else:
        dtype = wanted
    if device != "cpu" or dtype != "float32" or not model_type:
        return Precision(dtype, reason, dtype)
    return Precision(dtype, reason, *_cpu_frozen(recipe, parameters, model_type, flags))


def _cpu_frozen(
    recipe: Recipe, parameters: int, model_type: str, flags: frozenset[str] | None
) -> tuple[Dtype, str]:
    """bfloat16 only for what dense.py computes (it keeps sums, norms and the adapter in float32).

    And only where the CPU multiplies it in hardware: elsewhere it is slower than float32. What is
    merged and served stays float32.
    """
    settings = recipe.finetune
    if recipe.model.dtype != "auto":
        return "float32", "as the recipe says"
    if settings.method != "lora" or settings.loss or settings.num_processes > 1:
        return "float32", "exact; bfloat16 is used only for LoRA in one process"
    if model_type != "phi3" or recipe.model.attn_implementation not in (None, "sdpa"):
        return "float32", "exact; bfloat16 is used only for a Phi-3 with sdpa attention"
    if parameters < SMALL_MODEL:
        return "float32", "exact, and no slower for a model this small"
    supported = cpu_flags() if flags is None else flags
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in supported:
            return "bfloat16", f"the CPU multiplies it in hardware ({flag}); the adapter is float32"
    return "float32", "exact, and the fastest this CPU has (neither amx_bf16 nor avx512_bf16)"


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by Linux's names; empty on other systems."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


# Threads that wait. One that waits for the other ones of a product looks many times before it
# sleeps. On a quiet machine that is what makes two threads fast; under load it takes the CPU time
# that other programs, and the thread waited for, need.

# How often a waiting thread looks; OpenMP's own number is 300,000, at each of thousands of meetings
# a step. With a load of 5 to 8 on two cores four steps of a 135 M model did not end within 100 s
# with that number (twice), and took 15 to 25 s with this one (twice).
_LOOKS = "2000"
# A machine is idle while fewer programs than this share of its cores are ready to run.
_QUIET_SHARE = 0.75
_SETTING = "GOMP_SPINCOUNT"
_OTHER = "OMP_WAIT_POLICY"


def import_torch_without_spinning() -> None:
    """Import torch so where the machine is busy; nothing where it is imported or set by the user.

    OpenMP reads the setting once, when it is loaded; child processes are not to inherit it.
    """
    if "torch" in sys.modules or _SETTING in os.environ or _OTHER in os.environ or is_quiet():
        return
    os.environ[_SETTING] = _LOOKS
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[_SETTING]


def is_quiet() -> bool:
    """Whether other programs leave the cores free: the load of the last minute; False unknown."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return False
    return load < _QUIET_SHARE * (os.cpu_count() or 1)


# What bounds the memory of a training on the CPU. glibc keeps freed tensors below 32 MiB in its
# heap, between others that are still in use: the process then holds much more than it uses.

# A part of a batch has so many tokens at most, unless one conversation is longer: what the forward
# pass keeps is bounded, and matrix products of so many rows are as fast as any (0.7 MB a token in
# the 135 M model; a batch of 16 replayed chats has 2,400 tokens).
TOKENS_AT_ONCE = 1024
# Rows of the vocabulary's scores at once: 128 × 49,152 float32 are 25 MB, whatever the batch.
SCORED_AT_ONCE = 128

# Below this size a model's waste is small, and mapping each tensor again costs more time:
# half as much again at 33 M weights, a ninth at 277 M (with a fifth of the memory saved).
WORTH_IT = 200_000_000
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_SIZE = 2**20


def wastes_heap(parameters: int) -> bool:
    """Whether a model of this many weights is left to the C library's own way, heap and all."""
    has_mallopt = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
    return parameters < WORTH_IT or not has_mallopt


def give_back_at_once(parameters: int) -> bool:
    """Map every piece of 1 MiB and more on its own from now on, where that is worth it."""
    if wastes_heap(parameters):
        return False
    return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _SIZE))


def release() -> None:
    """Give the heap's free pages back to the system: between stages, each of which loads a model.

    Without it a process that trains, measures and converts the 135 M model kept 5.0 GB at its end.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Give back the pages between pieces in use: the heap of a long training only grows.

    The 135 M model's grew from 2.3 to 4.2 GB in 110 steps. A call takes milliseconds, and the pages
    have to be mapped again, so it is made every few steps.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@dataclass(frozen=True)
class Runtime:
    """The resolved device, number types and threads; `choices` says why, one line each.

    `dtype` and `frozen` are those of `choose_precision`.
    """

    device: str
    dtype: Dtype
    frozen: Dtype
    threads: int
    choices: tuple[str, ...]

    def as_dict(self) -> dict[str, str | int]:
        """For the manifest of the model."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "frozen_dtype": self.frozen,
            "num_threads": self.threads,
        }

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number type as torch names it."""
        import torch

        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def torch_frozen(self) -> torch.dtype:
        """The number type of frozen weights as torch names it."""
        import torch

        return getattr(torch, self.frozen)  # type: ignore[no-any-return]


def choose_runtime(recipe: Recipe, parameters: int, model_type: str = "") -> Runtime:
    """Decide for a model with this many parameters, on this machine.

    `model_type` is that of its config.json; without it nothing is trained faster for its sake.
    """
    import torch

    here = device()
    precision = choose_precision(
        recipe,
        here,
        has_bfloat16=here == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
        parameters=parameters,
        model_type=model_type,
    )
    threads = recipe.finetune.num_threads
    if threads is not None:
        why = "as the recipe says"
    elif here == "cpu" and parameters < SMALL_MODEL:
        threads, why = 1, "because the model is too small to gain from more"
    else:
        threads, why = torch.get_num_threads(), "torch's default on this machine"
    choices = [f"{precision.dtype}: {precision.reason}", f"torch threads: {threads}, {why}"]
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
    import torch

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
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
