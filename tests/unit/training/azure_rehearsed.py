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

from phi3_rehearsal import endpoints, workspaces
from phi3_rehearsal.cloud import Cloud, stamps
from phi3_rehearsal.compute import DEPLOYMENT_KIND
from phi3_rehearsal.identity import CALLER, token_for
from phi3_rehearsal.proxy import CutError, answer
from phi3_rehearsal.wire import ARM, Request
from phi3_training.recipe.azure import PollSection
from phi3_training.targets.azure.clients import Clients
from phi3_training.targets.azure.place import Place

from .azure_wire import place

GPU = "Standard_NC24ads_A100_v4"


def rehearsed(folder: Path, place: Place) -> Rehearsed:
    """Clients of a new, empty rehearsed Azure, that try once and wait for nothing."""
    cloud = Cloud(folder / "azure")
    clients = Rehearsed(place, PollSection(interval=0.05, retry_total=0), _Caller(cloud))
    clients.cloud = cloud
    return clients


def with_endpoint(folder: Path, name: str = "ep") -> Rehearsed:
    """A workspace with an endpoint of the run `mine` and a deployment, and another's endpoint."""
    here = place(folder)
    clients = rehearsed(folder, here)
    cloud = clients.cloud
    ready = {"provisioningState": "Succeeded"}
    body = {"location": here.location, "tags": {"created-by": "phi3-promptflow"}}
    for arm_id, kind in (
        (here.group_scope, "Microsoft.Resources/resourceGroups"),
        (here.workspace_id(), workspaces.KIND),
    ):
        cloud.put(arm_id, kind, {**body, "kind": "Default", "properties": dict(ready)})
    for endpoint, tags in ((name, {"phi3_run": "mine"}), ("theirs", {})):
        properties = {
            **ready,
            "authMode": "Key",
            "traffic": {},
            "properties": {},
            "scoringUri": f"https://{endpoint}/score",
        }
        document: Any = {"location": here.location, "tags": tags, "kind": "Managed"}
        document["systemData"] = stamps()
        arm_id = f"{here.workspace_id()}/onlineEndpoints/{endpoint}"
        cloud.put(arm_id, endpoints.KIND, {**document, "properties": properties})
    add_deployment(clients, name, "blue", {})
    return clients


def add_deployment(
    clients: Rehearsed, endpoint: str, name: str, tags: dict[str, str], state: str = "Succeeded"
) -> None:
    """Put a deployment, without a server."""
    here = clients.place
    properties = {
        "provisioningState": state,
        "instanceType": GPU,
        "endpointComputeType": "Managed",
        "scaleSettings": {"scaleType": "Default"},
    }
    document = {"location": here.location, "kind": "Managed", "sku": {"capacity": 1}, "tags": tags}
    arm_id = f"{here.workspace_id()}/onlineEndpoints/{endpoint}/deployments/{name}"
    clients.cloud.put(arm_id, DEPLOYMENT_KIND, {**document, "properties": properties})


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
