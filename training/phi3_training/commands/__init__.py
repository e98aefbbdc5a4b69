"""The commands of `phi3`, one module per group; each registers its own arguments."""

from __future__ import annotations

from . import data, journey, recipes, stages, talk

COMMANDS = (journey, stages, data, talk, recipes)
