"""Prompt flow on Azure: its connections here, in the workspace and in the Foundry project; flows.

Reads the manifest `endpoint` and a bundle's folder, which promptflow-azure uploads. The endpoint's
key is fetched when it is needed and goes into the connections only.
"""

from __future__ import annotations

import hmac
import io
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from phi3_tool.connection import ENTRA

from ...errors import MissingExtraError, StageError
from ...flow import store
from ...flow.bundle import Bundle
from ...flow.store import connect as connect_here
from ...manifests import ConnectionManifest, EndpointManifest
from ...progress import Progress, captured_output, note
from ...recipe import Recipe
from ...run import Run
from ..base import Access
from .clients import ARM, Clients
from .deploy import access_to
from .failures import HIDDEN, explained, message_of, scrub, stage_error
from .operations import TRIES, Outcome, is_absent, is_transient, within
from .place import AZURE, RUN_TAG, RunResource, record, recorded_resources
from .resources import CONNECTIONS_API

log = logging.getLogger(__name__)

T = TypeVar("T")
THIS_MACHINE = "this machine"
WRITER = "written_by"  # the key of metadata by which phi3 knows its own connections
_OURS = "phi3-promptflow"
# Without these two keys Studio's flow editor does not list a custom connection
# (MicrosoftDocs/azure-docs issue 120309).
_FLOW_METADATA = {
    "azureml.flow.connection_type": "Custom",
    "azureml.flow.module": "promptflow.connections",
}
CONTENT_TAG = "phi3_content"
Body = Mapping[str, Any]  # a connection as ARM's JSON has it


def connect(clients: Clients, recipe: Recipe, run: Run, progress: Progress) -> ConnectionManifest:
    """Write all three connections, read back the two in Azure."""
    endpoint = run.require(EndpointManifest)
    name = recipe.connection.name
    access = access_to(clients, endpoint.endpoint_name)
    # One connection name in three places, so that the same flow folder runs in each of them.
    # Without the deployment's name: the endpoint's traffic rules say who answers a flow.
    here = connect_here(EndpointManifest(endpoint=access.endpoint), access.key, name, run=run.name)
    states = {}
    for workspace in (clients.place.workspace_name, clients.place.project):
        note(progress, f"connection {name} in {workspace}")
        record(run, RunResource("connection", name, workspace))
        states[workspace] = write_connection(clients, workspace, name, access)
    choices = [
        *here.choices,
        *(f"connection in {workspace}: {state}" for workspace, state in states.items()),
        *([] if access.key else ["no key: the endpoint uses Entra tokens"]),
    ]
    return here.model_copy(update={"target": AZURE, "workspaces": list(states), "choices": choices})


def is_connected(clients: Clients, run: Run) -> bool:
    """Whether each of them still points to the run's endpoint; another run may have taken them."""
    manifest = run.require(ConnectionManifest)
    name, url = manifest.name, manifest.endpoint
    try:
        here, _key = store.read_connection(name)
    except store.StoreError:
        return False
    return here == url and all(
        connection_url(clients, workspace, name) == url for workspace in manifest.workspaces
    )


def stored_connections(clients: Clients, run: Run) -> dict[str, Any]:
    """Prompt flow's own connection objects by where they are, read as Prompt flow reads them."""
    manifest = run.require(ConnectionManifest)
    place, name = clients.place, manifest.name
    connections = {THIS_MACHINE: store.stored_connection(name)}
    for workspace in manifest.workspaces:
        connections[workspace] = store.workspace_connection(
            (place.subscription_id, place.resource_group, workspace), name, clients.credential
        )
    return connections


def connection_body(access: Access) -> dict[str, Any]:
    """The connection as ARM takes it; with Entra sign-in it holds no secret at all."""
    # By REST, because azure-ai-ml has no credential class for several custom keys. ARM refuses
    # custom keys that are empty, so with Entra the one key says how to sign in.
    keys = {"auth": ENTRA} if access.key is None else {"key": access.key}
    return {
        "properties": {
            # The SDK would write the authType ApiKey, which holds one key and no endpoint.
            "authType": "CustomKeys",
            "category": "CustomKeys",
            "target": "_",  # required by ARM, ignored by Prompt flow
            "isSharedToAll": False,  # of a hub: not for each of its projects
            "credentials": {"keys": keys},
            "metadata": {"endpoint": access.endpoint, WRITER: _OURS, **_FLOW_METADATA},
        }
    }


def write_connection(
    clients: Clients, workspace: str, name: str, access: Access
) -> Outcome | Literal["changed"]:
    """Put the connection into a workspace or project; "exists" where it says the same already.

    Read back afterwards. Raises StageError for a connection of that name that phi3 did not write.
    """
    body = connection_body(access)
    existing = read_connection(clients, workspace, name)
    if existing is not None and _is_same(existing, body):
        return "exists"
    if existing is not None and _metadata(existing).get(WRITER) != _OURS:
        raise StageError(
            f"{workspace} already has a connection {name} that phi3 did not write, so it was not "
            f"changed. Choose another name with connection.name=NAME"
        )
    doing = f"Writing the connection {name} into {workspace}"
    try:
        _send(clients, doing, "PUT", workspace, name, body=body)
    except StageError as error:  # a refusal may quote what it refuses
        hidden = str(error).replace(access.key, HIDDEN) if access.key else str(error)
        raise StageError(hidden) from None
    written = read_connection(clients, workspace, name)
    if written is None or not _is_same(written, body):
        raise StageError(
            f"{doing}: the connection read back differs from what was written. Write it again "
            f"with: "
            "phi3 connect --on azure"
        )
    return "created" if existing is None else "changed"


def read_connection(clients: Clients, workspace: str, name: str) -> Body | None:
    """The connection with its secrets, as `listsecrets` gives them; None if there is none."""
    # A GET never has them, nor has the SDK's own `connections.get`.
    doing = f"Reading the connection {name} of {workspace}"
    return _send(clients, doing, "POST", workspace, name, action="/listsecrets")


def connection_url(clients: Clients, workspace: str, name: str) -> str:
    """The URL that the connection points to, read without its secrets; '' if there is none."""
    doing = f"Looking at the connection {name} of {workspace}"
    connection = _send(clients, doing, "GET", workspace, name)
    return "" if connection is None else str(_metadata(connection).get("endpoint") or "")


def delete_connection(
    clients: Clients, workspace: str, name: str, endpoints: Collection[str]
) -> bool:
    """Delete a connection that phi3 wrote and that points to one of the endpoints; else False."""
    connection = read_connection(clients, workspace, name)
    if connection is None or _metadata(connection).get(WRITER) != _OURS:
        return False
    host = urlsplit(str(_metadata(connection).get("endpoint") or "")).hostname or ""
    # The first part of the host is the endpoint's name: NAME.REGION.inference.ml.azure.com.
    if host.partition(".")[0] not in endpoints:  # another run has it now
        return False
    _send(clients, f"Deleting the connection {name} of {workspace}", "DELETE", workspace, name)
    return True


def _is_same(connection: Body, wanted: Body) -> bool:
    """Whether two connections say the same; keys are compared in constant time."""
    ours, theirs = wanted["properties"], connection.get("properties") or {}
    keys = ((theirs.get("credentials") or {}).get("keys")) or {}
    expected = ours["credentials"]["keys"]
    if set(keys) != set(expected):
        return False
    equal = [
        hmac.compare_digest(str(keys[name]).encode(), str(value).encode())
        for name, value in expected.items()
    ]
    metadata = _metadata(connection)
    # Azure adds metadata of its own, so only ours is compared.
    return all(equal) and all(metadata.get(key) == text for key, text in ours["metadata"].items())


def _metadata(connection: Body) -> Mapping[str, object]:
    return (connection.get("properties") or {}).get("metadata") or {}


def _send(
    clients: Clients,
    doing: str,
    method: str,
    workspace: str,
    name: str,
    *,
    action: str = "",
    body: Body | None = None,
) -> Body | None:
    """One call about a connection, repeated after transient faults: none of them harms twice."""
    from azure.core.exceptions import AzureError
    from azure.core.rest import HttpRequest

    path = f"{clients.place.workspace_id(workspace)}/connections/{quote(name, safe='')}{action}"
    request = HttpRequest(
        method, f"{ARM}{path}", params={"api-version": CONNECTIONS_API}, json=body
    )
    # azure-core alone would repeat neither a POST after a reset nor anything after a 409.
    with clients.arm() as pipeline:
        for tries_left in reversed(range(TRIES)):
            try:
                response = pipeline.send_request(request)
                response.raise_for_status()
            except AzureError as error:
                if is_absent(error) and method != "PUT":
                    return None
                if not tries_left or not is_transient(error):
                    raise stage_error(error, doing) from None
            else:
                content: Body | None = response.json() if response.content else None
                return content
            time.sleep(clients.poll.interval)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class PushedFlow:
    """A flow in a workspace or project; `state` is "exists" or "made"."""

    workspace: str
    flow: str
    display_name: str
    page: str | None
    state: Literal["exists", "made"]


def push_flow(
    clients: Clients, run: Run, bundle: Bundle, workspace: str, progress: Progress
) -> PushedFlow:
    """Make the flow in a workspace or project."""
    store.quiet()
    try:
        from promptflow.azure import PFClient
    except ImportError as error:
        raise MissingExtraError(error.name or "promptflow-azure", "flow,azure") from None
    store.no_update_check()
    name = bundle.folder.name
    note(progress, f"flow {name} into {workspace}")
    open_client = partial(PFClient, ml_client=clients.ml_of(workspace))
    client = _in_our_words(f"Opening Prompt flow in {workspace}", open_client)
    doing = f"Pushing the flow {name} into {workspace}"
    resource = RunResource("flow", name, workspace)
    pushed_before = resource in recorded_resources(run, "flow")
    # Prompt flow cannot change a flow's files in the cloud, so a changed folder makes a new flow;
    # one of the same content is found by its tag and not made twice.
    flow = flow_of_content(client, bundle.sha256, doing, must_know=pushed_before)
    state: Literal["exists", "made"] = "exists"
    if flow is None:
        record(run, resource)
        start = partial(
            client.flows.create_or_update,
            flow=str(bundle.folder),
            display_name=name,
            type="chat",
            tags={CONTENT_TAG: bundle.sha256, RUN_TAG: run.name},
        )
        push = partial(_in_our_words, doing, start)
        flow = within(doing, push, progress, limit=clients.poll.upload_timeout)
        state = "made"
    page = getattr(flow, "flow_portal_url", None)
    return PushedFlow(workspace, str(flow.name), str(flow.display_name), page, state)


def flow_of_content(client: Any, content: str, doing: str, *, must_know: bool) -> Any | None:
    """A flow of the same content.

    Where the flows cannot be listed: None, or StageError if `must_know`, because this run has
    pushed one before and it may exist.
    """
    try:
        flows = _in_our_words(doing, lambda: client.flows.list(max_results=100))
    except StageError as error:
        if must_know:
            raise
        log.info("flows cannot be listed: %s", error)
        return None
    return next((flow for flow in flows if (flow.tags or {}).get(CONTENT_TAG) == content), None)


def _in_our_words(doing: str, call: Callable[[], T]) -> T:
    """Call promptflow-azure: without what it prints, and with its errors in our words."""
    from promptflow.exceptions import PromptflowException

    try:
        with captured_output(io.StringIO()), explained(doing):
            return call()
    except PromptflowException as error:
        inner = getattr(error, "inner_exception", None)
        words = message_of(inner) if inner is not None else scrub(str(error).strip())
        raise StageError(
            f"{doing} failed: {words.splitlines()[0] if words else type(error).__name__}.\n"
            "Fix: run the same command again; an existing flow is not created twice"
        ) from None
