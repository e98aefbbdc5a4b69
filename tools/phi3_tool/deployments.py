"""Which deployments an endpoint says it has, for the tool's list to choose from.

Asks the endpoint's GET /v1/models, once and briefly; writes nothing.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import requests
from urllib3.exceptions import HTTPError

from .connection import ENTRA, ConnectionSettings, parse_address
from .errors import one_line
from .transport import Deadline, deadline_applies, new_session, read_up_to

log = logging.getLogger(__name__)

# An editor waits for the list.
SECONDS = 5.0
_MAX_BYTES = 1024 * 1024
_MAX_NAMES = 200  # Azure allows 20 deployments of an endpoint; a gateway may list any number
_AZURE = ".inference.ml.azure.com"
_WITH = {None: "key", ENTRA: "token of your sign-in"}


@dataclass(frozen=True)
class Choice:
    """One entry of the list: what goes into the flow, and what a person reads."""

    value: str
    shown: str


def choices(settings: ConnectionSettings) -> list[Choice]:
    """ "No name", which always works, and the names that the endpoint lists; or why it lists none.

    ConfigurationError where the settings are unusable; an unreachable endpoint is not an error.
    """
    address = parse_address(settings.endpoint, settings.dialect)
    credential = settings.credential()
    # /v1/models next to /v1/chat/completions, or next to /score.
    parts = urlsplit(address.url)
    base = re.sub(r"(/chat/completions|/score)$", "", parts.path)
    path = f"{base if base.endswith('/v1') else f'{base}/v1'}/models"
    url = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    try:
        with new_session(address) as session, deadline_applies(Deadline(SECONDS, SECONDS)):
            response = session.get(
                url,
                auth=credential.auth(),
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
                timeout=SECONDS,
                allow_redirects=False,
                stream=True,
            )
            with response:
                status, body = response.status_code, bytes(read_up_to(_MAX_BYTES, response))
    except (requests.RequestException, HTTPError, OSError) as error:
        return [no_list(f"no answer from {url} ({type(error).__name__})")]
    if status in (401, 403):
        reason = f"the endpoint does not accept the {_WITH[settings.auth]} (status {status})"
        return [no_list(reason)]
    if status != 200:
        return [no_list(not_listed(url, status))]
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        payload = None
    data = payload.get("data") if isinstance(payload, dict) else None
    entries = data if isinstance(data, list) else []
    ids = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    names = [name for name in ids if isinstance(name, str) and name.isprintable() and name.strip()]
    if not names:
        return [no_list(f"{url} lists no model")]
    listed = [Choice(name, name) for name in names[:_MAX_NAMES]]
    return [Choice("", "(the endpoint chooses)"), *listed]


def no_list(reason: str) -> Choice:
    """The one entry of an empty list; a flow that uses it still works."""
    log.info("no deployments to choose from: %s", reason)
    return Choice("", f"(the endpoint chooses; no list: {one_line(reason)})")


def not_listed(url: str, status: int) -> str:
    """Why an endpoint that answers with this status lists no names."""
    if (urlsplit(url).hostname or "").endswith(_AZURE):
        return (
            "Azure lists the deployments of an endpoint for an identity, not for its key; list "
            "them with `az ml online-deployment list --endpoint-name NAME`"
        )
    return f"{url} answered status {status}"
