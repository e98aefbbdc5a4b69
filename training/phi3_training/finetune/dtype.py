"""Which number type a training computes in: one decision for all.

Asked by the training itself (runtime.py) and by the memory plan, which must not load torch; what a
CPU rounds frozen weights to meanwhile is precision.py's decision. Reads and writes nothing.
"""

from __future__ import annotations

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def choose_dtype(wanted: str, device: str, *, has_bfloat16: bool) -> tuple[Dtype, str]:
    """The number type for `model.dtype` on a kind of device, and the reason.

    `has_bfloat16`: whether a GPU multiplies bfloat16 in hardware.
    """
    if wanted == "float32":
        return "float32", "as the recipe says"
    if wanted == "bfloat16":
        return "bfloat16", "as the recipe says"
    if wanted == "float16" and device == "cpu":
        return "float32", "float16, which the recipe asks for, needs a GPU"
    if wanted == "float16":
        return "float16", "as the recipe says"
    if device == "cuda" and has_bfloat16:
        return "bfloat16", "the GPU supports it"
    if device == "cuda":
        return "float16", "the GPU has no bfloat16"
    return "float32", f"exact, and what a {device} computes fastest"
