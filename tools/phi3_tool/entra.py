"""Tokens of Microsoft Entra ID for an endpoint without a key; azure-identity gives them.

It is looked up only here and only then: the package itself needs requests alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from .errors import ConfigurationError

SCOPE = "https://ml.azure.com/.default"


def entra_tokens() -> Callable[[], str]:
    """A provider of fresh tokens, from whatever sign-in DefaultAzureCredential finds."""
    try:
        identity = importlib.import_module("azure.identity")
    except ModuleNotFoundError:
        raise ConfigurationError(
            "The connection signs in with Microsoft Entra ID (auth: entra), which needs the package"
            " azure-identity: pip install azure-identity"
        ) from None
    provider: Callable[[], str] = identity.get_bearer_token_provider(
        identity.DefaultAzureCredential(), SCOPE
    )
    return provider
