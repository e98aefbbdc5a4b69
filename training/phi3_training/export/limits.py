"""How far an export may be from what it was made of, and why so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..serve.export import Precision

Format = Literal["merged", "onnx-int4", "onnx-int8", "onnx-fp32"]
FORMATS: tuple[Format, ...] = get_args(Format)
PRECISIONS: dict[Format, Precision] = {
    "onnx-int4": "int4",
    "onnx-int8": "int8",
    "onnx-fp32": "fp32",
}


@dataclass(frozen=True)
class Limits:
    """What is allowed at most (or, for agreement, at least); `why` says where it comes from.

    `weights`: root mean square of a layer's deviation, as a share of the layer's own. `change`:
    the same as a share of what the adapter changed in it.
    """

    token_agreement: float
    mean_kl: float
    worst_kl: float
    lost_answers: float
    weights: float
    change: float
    why: str

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return dict(vars(self))


_ROUNDED = "each weight is rounded to the nearest {}; that is noise, not a trend"

# Merging in exactly the number type of the training. The rounding of a weight is uniform within
# half a step, so its share is about step/sqrt(12): 1e-3 for bfloat16, 1.4e-4 for float16.
MERGED: dict[str, Limits] = {
    "float32": Limits(0.999, 1e-6, 1e-5, 0.0, 1e-6, 1e-3, "float32 adds exactly but for 1e-7"),
    "float16": Limits(0.99, 1e-3, 1e-2, 0.02, 4e-4, 0.5, _ROUNDED.format("float16")),
    "bfloat16": Limits(0.98, 1e-2, 1e-1, 0.02, 3e-3, 0.5, _ROUNDED.format("bfloat16")),
}

ONNX: dict[str, Limits] = {
    "onnx-fp32": Limits(
        0.999, 1e-5, 1e-4, 0.0, 0.0, 0.0, "the same sums in another order: only ties may fall apart"
    ),
    # Measured on SmolLM2-135M: 90 % of the tokens, mean KL 0.05, nine parts in ten of it from the
    # activations (with 8-bit weights alone: 97 %, 0.005).
    "onnx-int8": Limits(
        0.85, 0.1, 1.0, 0.1, 0.0, 0.0, "eight bits for a weight and for what it is multiplied by"
    ),
    # Measured on the tiny Phi-3: 93 % of the tokens, mean KL 0.03, 2 of 39 answers lost. A broken
    # conversion is far outside: KL above 1, next to no answer left.
    "onnx-int4": Limits(
        0.85, 0.1, 1.0, 0.1, 0.0, 0.0, "four bits for a weight: words swap where it is unsure"
    ),
}
