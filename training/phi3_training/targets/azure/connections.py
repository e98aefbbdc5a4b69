"""Prompt flow's connections in the workspace and the Foundry project, by REST.

The SDK has no credentials of several custom keys, and Studio shows a custom connection only with
the two `azureml.flow.` keys of metadata. Keys pass through memory; nothing is written here.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import quote, urlsplit

from phi3_tool.connection import ENTRA

from ...errors import StageError
from ..base import Access
from .clients import ARM, Clients
from .failures import HIDDEN, stage_error
from .waiting import TRIES, absent, passing

API = "2024-04-01"
WRITER = "written_by"  # the key of metadata by which we know our own
_OURS = "phi3-promptflow"
_FLOW_METADATA = {
    "azureml.flow.connection_type": "Custom",
    "azureml.flow.module": "promptflow.connections",
}
Body = dict[str, Any]


def body_of(access: Access) -> Body:
    """The connection as ARM takes it; with Entra sign-in it holds no secret at all.

    ARM refuses custom keys without any, so that there the key says how to sign in.
    """
    keys = {"auth": ENTRA} if access.key is None else {"key": access.key}
    return {
        "properties": {
            "authType": "CustomKeys",
            "category": "CustomKeys",
            "target": "_",
            "isSharedToAll": False,
            "credentials": {"keys": keys},
            "metadata": {"endpoint": access.endpoint, WRITER: _OURS, **_FLOW_METADATA},
        }
    }


def write_connection(clients: Clients, workspace: str, name: str, access: Access) -> str:
    """Put the connection into a workspace or project; "exists" where it says the same already.

    Read back afterwards. Raises StageError for somebody else's connection of that name.
    """
    body = body_of(access)
    found = read_connection(clients, workspace, name)
    if found is not None and _same(found, body):
        return "exists"
    if found is not None and _metadata(found).get(WRITER) != _OURS:
        raise StageError(
            f"{workspace} already has a connection {name} that phi3 did not write; it stays as it "
            "is. Choose another name with connection.name=NAME"
        )
    doing = f"Writing the connection {name} into {workspace}"
    try:
        _send(clients, doing, "PUT", _path(clients, workspace, name), body)
    except StageError as error:  # a refusal may quote what it refuses
        hidden = str(error).replace(access.key, HIDDEN) if access.key else str(error)
        raise StageError(hidden) from None
    written = read_connection(clients, workspace, name)
    if written is None or not _same(written, body):
        raise StageError(
            f"{doing}: read back, it does not say what was written. Write it again with: "
            "phi3 connect --on azure"
        )
    return "made" if found is None else "changed"


def read_connection(clients: Clients, workspace: str, name: str) -> Body | None:
    """The connection with its secrets, as `listsecrets` gives them; None where there is none."""
    doing = f"Reading the connection {name} of {workspace}"
    return _send(clients, doing, "POST", _path(clients, workspace, name) + "/listsecrets")


def leads_to(clients: Clients, workspace: str, name: str) -> str:
    """The URL that the connection leads to, read without its secrets; '' where there is none."""
    doing = f"Looking at the connection {name} of {workspace}"
    found = _send(clients, doing, "GET", _path(clients, workspace, name))
    return "" if found is None else str(_metadata(found).get("endpoint") or "")


def delete_connection(
    clients: Clients, workspace: str, name: str, endpoints: Collection[str]
) -> bool:
    """Delete a connection that was written here and leads to one of the endpoints; else False."""
    found = read_connection(clients, workspace, name)
    if found is None or _metadata(found).get(WRITER) != _OURS:
        return False
    host = urlsplit(str(_metadata(found).get("endpoint") or "")).hostname or ""
    if host.partition(".")[0] not in endpoints:  # another run has it now
        return False
    doing = f"Deleting the connection {name} of {workspace}"
    _send(clients, doing, "DELETE", _path(clients, workspace, name))
    return True


def _path(clients: Clients, workspace: str, name: str) -> str:
    return f"{clients.workplace.workspace_id(workspace)}/connections/{quote(name, safe='')}"


def _same(found: Body, wanted: Body) -> bool:
    """Whether two connections say the same; keys are compared without hints by time."""
    mine, theirs = wanted["properties"], found.get("properties") or {}
    keys = ((theirs.get("credentials") or {}).get("keys")) or {}
    expected = mine["credentials"]["keys"]
    if set(keys) != set(expected):
        return False
    equal = [
        hmac.compare_digest(str(keys[name]).encode(), str(value).encode())
        for name, value in expected.items()
    ]
    metadata = _metadata(found)
    told = all(metadata.get(name) == value for name, value in mine["metadata"].items())
    return all(equal) and told


def _metadata(found: Body) -> dict[str, Any]:
    return (found.get("properties") or {}).get("metadata") or {}


def _send(
    clients: Clients, doing: str, method: str, path: str, body: Body | None = None
) -> Body | None:
    """One call of ARM, repeated after faults that pass: each of them may be sent twice."""
    from azure.core.exceptions import AzureError
    from azure.core.rest import HttpRequest

    request = HttpRequest(method, f"{ARM}{path}", params={"api-version": API}, json=body)
    with clients.arm() as pipeline:
        for left in reversed(range(TRIES)):
            try:
                response = pipeline.send_request(request)
                response.raise_for_status()
            except AzureError as error:
                if absent(error) and method != "PUT":
                    return None
                if not left or not passing(error):
                    raise stage_error(error, doing) from None
            else:
                found: Body | None = response.json() if response.content else None
                return found
            time.sleep(clients.poll.interval)
    raise AssertionError("unreachable")
