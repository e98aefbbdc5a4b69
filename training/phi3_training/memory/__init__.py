"""The memory plan: what training, evaluation and serving will use, from the model's config.

Reads a recipe, a config.json, and how long the rows of the chats are; loads neither torch nor
weights for the prediction.
"""

from __future__ import annotations

from .advise import memory_plan
from .model import Device, of_size, this_device
from .rows import RowSizes, row_sizes

__all__ = ["Device", "RowSizes", "memory_plan", "of_size", "row_sizes", "this_device"]
