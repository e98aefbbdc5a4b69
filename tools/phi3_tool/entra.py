"""Tokens of Microsoft Entra ID for an endpoint without a key; azure-identity gives them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

from .connection import ENTRA, ConnectionSettings
from .credentials import Credential
from .errors import ConfigurationError, one_line

# An endpoint's audience; a token for ARM (management.azure.com) gets a 401 there.
SCOPE = "https://ml.azure.com/.default"


def credential_of(settings: ConnectionSettings) -> Credential:
    """What signs a request to the connection's endpoint: its key, or tokens where it has none."""
    if settings.auth == ENTRA:
        return Credential(None, entra_tokens())
    return Credential(settings.key, None)


def entra_tokens(
    scope: str = SCOPE, who: str = "The connection signs in with Microsoft Entra ID (auth: entra)"
) -> Callable[[], str]:
    """A provider of fresh tokens, from whatever sign-in DefaultAzureCredential finds.

    `who` begins the errors: what needs the tokens.
    """
    # By name, when it is needed: the package itself needs requests alone.
    try:
        identity = importlib.import_module("azure.identity")
        azure_error = importlib.import_module("azure.core.exceptions").AzureError
    except ModuleNotFoundError:
        raise ConfigurationError(
            f"{who}, which needs the package azure-identity: pip install azure-identity"
        ) from None
    # Without any handler Python prints its warnings, a page for a sign-in that is missing.
    logging.getLogger("azure.identity").addHandler(logging.NullHandler())
    provider: Callable[[], str] = identity.get_bearer_token_provider(
        identity.DefaultAzureCredential(), scope
    )

    def token() -> str:
        try:
            return provider()
        except azure_error as error:
            first = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise ConfigurationError(
                f"{who}, but no sign-in returned a token: {first} Sign in with: az login"
            ) from None

    return token
