"""The commands of `phi3`, one module per group; each registers its own arguments."""

from __future__ import annotations

from . import adapters, batch, data, doctor, export, flow, journey, recipes, stages, talk

COMMANDS = (journey, stages, adapters, data, talk, batch, flow, export, doctor, recipes)
