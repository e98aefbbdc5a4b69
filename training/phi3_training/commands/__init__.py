"""The commands of `phi3`, one module per group; each registers its own arguments."""

from __future__ import annotations

from .azure import register_azure, register_rehearse
from .chat import register_batch, register_chat, register_invoke
from .data import register_data
from .doctor import register_doctor
from .flow import register_flow
from .models import (
    register_adapters,
    register_export,
    register_init,
    register_models,
    register_recipes,
)
from .status import register_status
from .up import register_stages, register_up

# In the order of `phi3 --help`.
COMMANDS = (
    *(register_up, register_status, register_stages, register_adapters, register_data),
    *(register_chat, register_invoke, register_batch, register_flow, register_export),
    *(register_doctor, register_init, register_recipes, register_models),
    *(register_azure, register_rehearse),
)
