"""Whether torch finds a GPU. A module of its own, so that only engines import torch."""

from __future__ import annotations

import torch


def cuda_available() -> bool:
    """Whether CUDA works here."""
    return bool(torch.cuda.is_available())
