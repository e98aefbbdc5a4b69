"""Endpoint URLs: what is a usable one, which dialect it speaks, and whether a key may go there.

Pure functions over text; read nothing, write nothing.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from .errors import ConfigurationError
from .wire import DIALECTS, Dialect, guess_dialect

# Deliberately narrow: two URL parsers must never disagree about where a key goes.
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")


@dataclass(frozen=True)
class Address:
    """A checked endpoint. `shown` is the URL without its query, fit for logs and messages."""

    url: str
    shown: str
    dialect: Dialect
    is_loopback: bool


def parse_address(endpoint: object, dialect: str | None = None) -> Address:
    """The checked form of an endpoint URL; ConfigurationError says what is wrong with it."""
    if not isinstance(endpoint, str) or not endpoint.strip():
        raise ConfigurationError("the endpoint URL is missing")
    text = endpoint.strip()
    if not text.isascii() or not text.isprintable() or any(c in text for c in " \\<>\"'`{}"):
        raise ConfigurationError("the endpoint URL holds spaces or signs that no URL may hold")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise ConfigurationError("the endpoint is no URL that can be read") from None
    host = (parts.hostname or "").lower()
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise ConfigurationError(
            "the endpoint must be a whole URL such as https://<name>.<region>.inference.ml.azure.com/score"
        )
    if "@" in parts.netloc:
        raise ConfigurationError("the endpoint URL must not carry a user name or password")
    if not _HOST_AND_PORT.fullmatch(parts.netloc) or port == 0:
        raise ConfigurationError("the endpoint URL has no usable host and port")
    loopback = is_loopback(host)
    if parts.scheme.lower() == "http" and not loopback:
        raise ConfigurationError(
            f"the endpoint is plain http to {host}: a key is sent only over https, or over http"
            " to this machine itself; use the https URL"
        )
    spoken = _choose_dialect(text, dialect)
    path = parts.path.rstrip("/")
    if spoken == "openai" and path.endswith("/v1"):
        path += "/chat/completions"
    scheme = parts.scheme.lower()
    return Address(
        url=urlunsplit((scheme, parts.netloc, path, parts.query, "")),
        shown=urlunsplit((scheme, parts.netloc, path, "", "")),
        dialect=spoken,
        is_loopback=loopback,
    )


def in_dialect(endpoint: str, dialect: Dialect) -> str:
    """The endpoint's URL for the other dialect beside it; unchanged where the path is no usual one.

    Our own endpoint, and Azure's images that speak both, answer on either path.
    """
    usual = {"score": "/score", "openai": "/v1/chat/completions"}
    parts = urlsplit(endpoint)
    for ending in usual.values():
        if parts.path.endswith(ending):
            path = parts.path[: -len(ending)] + usual[dialect]
            return urlunsplit(parts._replace(path=path))
    return endpoint


def same_endpoint(one: str, other: str) -> bool:
    """Whether two URLs lead to one endpoint, be it in another dialect."""
    return in_dialect(one, "score") == in_dialect(other, "score")


def is_loopback(host: str) -> bool:
    """Whether a host name or address literal can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _choose_dialect(url: str, asked: str | None) -> Dialect:
    if asked is None:
        return guess_dialect(url)
    chosen = next((dialect for dialect in DIALECTS if dialect == asked), None)
    if chosen is None:
        raise ConfigurationError(f"dialect is {asked!r}, but must be 'score' or 'openai'")
    path = urlsplit(url).path.strip("/")
    told = guess_dialect(url) if path.endswith(("score", "chat/completions", "v1")) else None
    if not path or (told is not None and told != chosen):
        fitting = "/score" if chosen == "score" else "/v1/chat/completions"
        raise ConfigurationError(
            f"dialect is {chosen!r}, but the endpoint URL does not fit it: it should end with"
            f" {fitting}"
        )
    return chosen
