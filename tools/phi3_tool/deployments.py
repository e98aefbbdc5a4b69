"""Which deployments an endpoint says it has, for the tool's list to choose from.

Asks the endpoint's GET /v1/models, once and briefly; writes nothing.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import requests
from urllib3.exceptions import HTTPError

from .connection import ENTRA, Address, ConnectionSettings, parse_address
from .credentials import Credential
from .entra import credential_of
from .errors import one_line
from .transport import Deadline, deadline_applies, new_session, read_up_to

log = logging.getLogger(__name__)

# An editor waits for the list.
SECONDS = 5.0
_MAX_BYTES = 1024 * 1024
_MAX_NAMES = 200
_AZURE = ".inference.ml.azure.com"
_WITH = {None: "key", ENTRA: "token of your sign-in"}


@dataclass(frozen=True)
class Choice:
    """One entry of the list: what goes into the flow, and what a person reads."""

    value: str
    shown: str


def choices(settings: ConnectionSettings) -> list[Choice]:
    """ "No name", which always works, and the names that the endpoint tells; or why it tells none.

    ConfigurationError where the settings are unusable; an unreachable endpoint is not an error.
    """
    names, reason = _names(settings)
    if names:
        return [Choice("", "(the endpoint chooses)"), *(Choice(name, name) for name in names)]
    return [no_list(reason)]


def no_list(reason: str) -> Choice:
    """The one entry of an empty list; a flow that uses it still works."""
    log.info("no deployments to choose from: %s", reason)
    return Choice("", f"(the endpoint chooses; no list: {one_line(reason)})")


def _names(settings: ConnectionSettings) -> tuple[list[str], str]:
    address = parse_address(settings.endpoint, settings.dialect)
    credential = credential_of(settings)
    url = _models_url(address)
    try:
        status, body = _get(url, address, credential)
    except (requests.RequestException, HTTPError, OSError) as error:
        return [], f"no answer from {url} ({type(error).__name__})"
    if status in (401, 403):
        return [], f"the endpoint does not accept the {_WITH[settings.auth]} (status {status})"
    if status != 200:
        return [], not_told(url, status)
    names = _ids(body)
    return names, "" if names else f"{url} lists no model"


def _models_url(address: Address) -> str:
    """/v1/models next to /v1/chat/completions, or next to /score."""
    parts = urlsplit(address.url)
    path = parts.path
    for ending in ("/chat/completions", "/score"):
        if path.endswith(ending):
            path = path[: -len(ending)]
            break
    path = path if path.endswith("/v1") else f"{path}/v1"
    return urlunsplit((parts.scheme, parts.netloc, f"{path}/models", "", ""))


def _get(url: str, address: Address, credential: Credential) -> tuple[int, bytes]:
    deadline = Deadline(SECONDS, SECONDS)
    with new_session(address) as session, deadline_applies(deadline):
        response = session.get(
            url,
            auth=credential.auth(),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=SECONDS,
            allow_redirects=False,
            stream=True,
        )
        with response:
            return response.status_code, bytes(read_up_to(_MAX_BYTES, response))


def not_told(url: str, status: int) -> str:
    """Why an endpoint that answers with this status tells no names."""
    if (urlsplit(url).hostname or "").endswith(_AZURE):
        return (
            "Azure lists the deployments of an endpoint for an identity, not for its key; list "
            "them with `az ml online-deployment list --endpoint-name NAME`"
        )
    return f"{url} answered status {status}"


def _ids(body: bytes) -> list[str]:
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        return []
    data = payload.get("data") if isinstance(payload, dict) else None
    entries = data if isinstance(data, list) else []
    ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    names = [name for name in ids if isinstance(name, str) and name.isprintable() and name.strip()]
    return names[:_MAX_NAMES]
