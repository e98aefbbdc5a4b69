"""phi3_tool: a client, and a Prompt flow tool, for a fine-tuned Phi-3 behind an HTTP endpoint.

Needs requests alone; only phi3_tool.chat imports Prompt flow, and nothing here imports that.
"""

# First, and as plain text: setup.py reads it from here, and client.py sends it.
__version__ = "0.1.0"

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
from .history import from_messages, to_messages
from .wire import Answer, Dialect, build_request, guess_dialect, read_answer

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
