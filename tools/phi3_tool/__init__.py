"""phi3_tool: a client, and a Prompt flow tool, for a fine-tuned Phi-3 served over HTTP.

Needs requests alone; only phi3_tool.chat imports Prompt flow, and nothing here imports that.
"""

# First, and as plain text: setup.py reads it from here, and client.py sends it.
__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import ChatReply, Phi3Client
    from .connection import ConnectionSettings
    from .errors import (
        AuthenticationError,
        ConfigurationError,
        EndpointNotFoundError,
        EndpointTimeoutError,
        ModelError,
        Phi3Error,
        RequestRejectedError,
        ServiceError,
        ThrottledError,
        UnreadableAnswerError,
    )
    from .wire import (
        Answer,
        Dialect,
        build_request,
        from_messages,
        guess_dialect,
        read_answer,
        to_messages,
    )

__all__ = [
    "Answer",
    "AuthenticationError",
    "ChatReply",
    "ConfigurationError",
    "ConnectionSettings",
    "Dialect",
    "EndpointNotFoundError",
    "EndpointTimeoutError",
    "ModelError",
    "Phi3Client",
    "Phi3Error",
    "RequestRejectedError",
    "ServiceError",
    "ThrottledError",
    "UnreadableAnswerError",
    "__version__",
    "build_request",
    "from_messages",
    "guess_dialect",
    "read_answer",
    "to_messages",
]

# Loaded when first used (PEP 562): the client brings requests, a tenth of a second.
_HOMES = {
    "client": ("ChatReply", "Phi3Client"),
    "connection": ("ConnectionSettings",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "wire": (
        "Answer",
        "Dialect",
        "build_request",
        "from_messages",
        "guess_dialect",
        "read_answer",
        "to_messages",
    ),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
