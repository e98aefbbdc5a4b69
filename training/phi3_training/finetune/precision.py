"""Which numbers a training computes in, and why: one decision for the training and the memory plan.

Reads the kernel's list of what the CPU can do; writes nothing and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from ..recipe import Recipe

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
    dtype, reason = _dtype(recipe.model.dtype, device, has_bfloat16=has_bfloat16)
    if device != "cpu" or dtype != "float32" or not model_type:
        return Precision(dtype, reason, dtype)
    return Precision(dtype, reason, *_cpu_frozen(recipe, parameters, model_type, flags))


def _dtype(wanted: str, device: str, *, has_bfloat16: bool) -> tuple[Dtype, str]:
    if wanted == "float32":
        return "float32", "as the recipe says"
    if wanted == "bfloat16":
        return "bfloat16", "as the recipe says"
    if wanted == "float16" and device == "cpu":
        return "float32", "the recipe sets float16, which needs a GPU"
    if wanted == "float16":
        return "float16", "as the recipe says"
    if device == "cuda" and has_bfloat16:
        return "bfloat16", "the GPU supports it"
    if device == "cuda":
        return "float16", "the GPU has no bfloat16"
    return "float32", f"exact, and the fastest on a {device}"


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
