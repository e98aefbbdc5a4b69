"""The commands of `phi3`, one module per group; each registers its own arguments."""

from __future__ import annotations

from . import (
    adapters,
    azure,
    batch,
    data,
    doctor,
    export,
    flow,
    init,
    invoke,
    journey,
    models,
    recipes,
    rehearse,
    stages,
    standing,
    talk,
)

COMMANDS = (
    *(journey, standing, stages, adapters, data, talk, invoke, batch),
    *(flow, export, doctor, init, recipes, models, azure, rehearse),
)
