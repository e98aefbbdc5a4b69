"""Values that recipes and the server's settings share: engines, what `auto` takes, web origins.

Looks at what is installed and whether there is a GPU, without importing torch for it.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

# `ort-genai` is the earlier name of `onnxruntime`: recipes and settings may still say it.
EngineName = Annotated[
    Literal["auto", "onnxruntime", "transformers", "upstream"],
    BeforeValidator(lambda name: "onnxruntime" if name == "ort-genai" else name),
]


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"https?://[^/\s*]+", text):
        raise ValueError("expected an origin such as http://localhost:3000 (no path), or *")
    return text


# A web page's origin as browsers send it, or * for any page: a value of serve.cors_origins.
Origin = Annotated[str, AfterValidator(_origin)]

# Linux with the driver, Windows' WSL, and containers that were given no device node.
_GPU_MARKS = ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version")


def choose_engine(
    asked: EngineName = "auto", *, adapters: bool = False, gpu: bool | None = None
) -> tuple[EngineName, str]:
    """The engine to take and the reason, fit for `engine X: REASON`.

    `adapters`: a run's adapters are served by name. `gpu`: whether the machine that serves has an
    NVIDIA GPU, and every package; None: look at this one.
    """
    if adapters:
        return "transformers", "it serves the run's adapters by name"
    if asked != "auto":
        return asked, "set in the recipe"
    if has_gpu() if gpu is None else gpu:
        return "transformers", "there is an NVIDIA GPU"
    # Asked for another machine (`gpu` given), its packages are the image's: all of them are there.
    missing = [name for name in ("onnxruntime", "onnxruntime_genai") if not find_spec(name)]
    if missing and gpu is None:
        return "transformers", f"{missing[0]} is not installed"
    return "onnxruntime", "no GPU, and ONNX Runtime is the fastest on a CPU"


def has_gpu() -> bool:
    """Whether torch can use an NVIDIA GPU here; imports torch only where there seems to be one."""
    if not find_spec("torch") or not any(Path(mark).exists() for mark in _GPU_MARKS):
        return False
    import torch

    return bool(torch.cuda.is_available())
