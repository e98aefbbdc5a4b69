"""The key or token of an endpoint: checked, sent as a Bearer header, and kept out of every text.

Where an endpoint has no key, azure-identity gives tokens of Microsoft Entra ID. Nothing here is
written anywhere.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

from requests import PreparedRequest
from requests.auth import AuthBase

from .errors import ConfigurationError, one_line

_HIDDEN = "[key hidden]"
# An endpoint's audience; a token for ARM (management.azure.com) gets a 401 there.
SCOPE = "https://ml.azure.com/.default"


def clean_secret(value: object, what: str = "key") -> str:
    """The secret without surrounding blanks; ConfigurationError (never quoting it) if unusable."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"the {what} is missing")
    secret = value.strip()
    if secret.lower().startswith("bearer "):
        raise ConfigurationError(f"the {what} starts with the word Bearer: give only the {what}")
    # requests refuses such a header with an error that quotes it, secret and all.
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigurationError(
            f"the {what} contains a line break, a space or another invalid character: copy it "
            f"again, in one piece"
        )
    return secret


class Credential:
    """Hands out the secret for one request at a time; shows nothing of it."""

    __slots__ = ("_current", "_fetch", "is_set", "renewable")

    def __init__(self, key: str | None, token_provider: Callable[[], str] | None) -> None:
        self.renewable = token_provider is not None
        self.is_set = self.renewable or key is not None
        secret = None if key is None else clean_secret(key)
        # In closures, so that neither a repr nor vars() nor a debugger's list of attributes shows
        # it.
        self._fetch: Callable[[], str | None] = token_provider or (lambda: secret)
        self._current: Callable[[], str | None] = lambda: secret

    def __repr__(self) -> str:
        return "<Credential: hidden>"

    def auth(self) -> BearerAuth:
        """What signs the next request; a token provider is asked each time (it caches)."""
        token = self._fetch()
        if self.renewable:
            token = clean_secret(token, "token from the token provider")
            self._current = lambda: token
        return BearerAuth(token)

    def scrub(self, text: str) -> str:
        """The text with every occurrence of the secret taken out."""
        secret = self._current()
        return text.replace(secret, _HIDDEN) if secret else text

    def quote(self, text: str) -> str:
        """Another party's words made fit to show: no secret, one line, at most 300 characters."""
        # Scrubbed first: a cut through the middle of the secret would leave half of it.
        return one_line(self.scrub(text))


class BearerAuth(AuthBase):
    """Sets the Authorization header."""

    # An auth object, not a header: with one requests does not look for a key in ~/.netrc.
    def __init__(self, secret: str | None) -> None:
        self._secret: Callable[[], str | None] = lambda: secret

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        secret = self._secret()
        if secret is not None:
            request.headers["Authorization"] = f"Bearer {secret}"
        return request

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BearerAuth) and self._secret() == other._secret()

    def __hash__(self) -> int:
        return hash(self._secret())

    def __repr__(self) -> str:
        return "<BearerAuth: hidden>"

    def __getstate__(self) -> object:
        raise TypeError("a credential is not written to anything")


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
