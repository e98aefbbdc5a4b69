"""Clients whose calls the rehearsed Azure answers in this process: no server, no network."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

import requests
from azure.core.credentials import AccessToken
from azure.core.pipeline.transport import RequestsTransport

from phi3_rehearsal.cloud import Cloud
from phi3_rehearsal.identity import CALLER, token_for
from phi3_rehearsal.proxy import CutError, answer
from phi3_rehearsal.wire import ARM, Request
from phi3_training.recipe.azure import PollSection
from phi3_training.targets.azure.clients import Clients
from phi3_training.targets.azure.place import Place


def rehearsed(folder: Path, place: Place) -> Rehearsed:
    """Clients of a new, empty rehearsed Azure, that try once and wait for nothing."""
    cloud = Cloud(folder / "azure")
    clients = Rehearsed(place, PollSection(interval=0.05, retry_total=0), _Caller(cloud))
    clients.cloud = cloud
    return clients


class Rehearsed(Clients):
    """Clients whose calls the rehearsed Azure answers in this process."""

    cloud: Cloud

    def _options(self) -> dict[str, Any]:
        session = requests.Session()
        session.mount("https://", _Adapter(self.cloud))
        transport = RequestsTransport(session=session, session_owner=False)
        return {**super()._options(), "transport": transport}


class _Adapter(requests.adapters.BaseAdapter):
    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    def send(self, request: Any, **_options: Any) -> requests.Response:
        body = request.body or b""
        sent = Request(
            request.method,
            request.url.split("/")[2],
            request.path_url,
            {name.lower(): value for name, value in request.headers.items()},
            body.encode() if isinstance(body, str) else body,
        )
        try:
            reply = answer(self.cloud, sent)
        except CutError:
            raise requests.exceptions.ConnectionError("reset") from None
        response = requests.Response()
        response.status_code, response.url, response.request = reply.status, request.url, request
        response.headers.update({"Content-Type": "application/json", **reply.headers})
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        response.raw = io.BytesIO(b"" if reply.body is None else content)
        return response

    def close(self) -> None:
        """Nothing is open."""


class _Caller:
    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud

    def get_token(self, *_scopes: str, **_options: Any) -> AccessToken:
        return AccessToken(token_for(self.cloud, CALLER, f"https://{ARM}"), int(time.time()) + 3600)
