"""The memory plan: what training, evaluation and serving will hold, told from the model's config.

Reads a recipe and, at most, a config.json; loads neither torch nor weights for the prediction.
"""

from __future__ import annotations

from .advise import memory_plan
from .device import Device, of_size, this_device

__all__ = ["Device", "memory_plan", "of_size", "this_device"]
