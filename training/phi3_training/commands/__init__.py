"""The commands of `phi3`, one module per group; each registers its own arguments."""

from __future__ import annotations

from . import (
    adapters,
    azure,
    data,
    doctor,
    export,
    flow_push,
    invoke,
    journey,
    recipes,
    rehearsing,
    stages,
    standing,
    talk,
)

COMMANDS = (
    *(journey, standing, stages, adapters, data),
    *(talk, invoke, flow_push, export, doctor, recipes, azure, rehearsing),
)
