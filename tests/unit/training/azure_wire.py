"""Clients whose calls end in this process: each is kept, and answered by what a test says."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

import requests
from azure.core.credentials import AccessToken
from azure.core.pipeline.transport import RequestsTransport

from phi3_training.manifests import DatasetManifest
from phi3_training.recipe.azure import AzureSection, PollSection
from phi3_training.run import Run
from phi3_training.targets.azure.clients import Clients
from phi3_training.targets.azure.place import Place, find_place

SUBSCRIPTION = "00000000-1111-2222-3333-444444444444"
Answer = tuple[int, dict[str, Any]]


class Token:
    """A credential that signs in nowhere."""

    def get_token(self, *_scopes: str, **_options: Any) -> AccessToken:
        return AccessToken("a-token", int(time.time()) + 3600)


@dataclass
class Wire(requests.adapters.BaseAdapter):
    """Takes what would be sent; `answer` says what comes back."""

    answer: Callable[[str, str], Answer]
    sent: list[tuple[str, str, Any]] = field(default_factory=list)

    def send(self, request: Any, **_options: Any) -> requests.Response:
        body = request.body.decode() if isinstance(request.body, bytes) else request.body
        self.sent.append((request.method, request.url, json.loads(body) if body else None))
        status, content = self.answer(request.method, request.url)
        response = requests.Response()
        response.status_code = status
        response.headers["Content-Type"] = "application/json"
        response.raw = io.BytesIO(json.dumps(content).encode())
        response.url, response.request = request.url, request
        return response

    def close(self) -> None:
        """Nothing is open."""


def run_with_chats(folder: Path) -> Run:
    """A run whose data is prepared: a row to train on, and one held out."""
    run = Run.open(folder / "run")
    run.write(DatasetManifest(outputs={}))
    for part in ("train", "validation"):
        run.file("data", f"{part}.jsonl").write_text('{"messages": []}\n')
    return run


def place(folder: Path, **section: Any) -> Place:
    """A place on Azure, without the environment."""
    content = AzureSection(subscription_id=SUBSCRIPTION, **section)
    return find_place(content, {}, folder)


def clients(wire: Wire, folder: Path) -> Clients:
    """Clients over the wire, that try once and wait for nothing."""
    made = _Wired(place(folder), PollSection(interval=0.05, retry_total=0), Token())
    made.wire = wire
    return made


class _Wired(Clients):
    wire: Wire

    def _options(self) -> dict[str, Any]:
        session = requests.Session()
        session.mount("https://", self.wire)
        transport = RequestsTransport(session=session, session_owner=False)
        return {**super()._options(), "transport": transport}
