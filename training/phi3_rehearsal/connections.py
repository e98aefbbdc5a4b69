"""Connections of workspaces and projects; their secrets are sealed, and told on request only."""

from __future__ import annotations

import re

from .cloud import Cloud, public, route, stamps
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, bad
from .workspaces import need_workspace

KIND = f"{ML}/workspaces/connections"
_CONNECTION = WORKSPACE + "/connections/{name}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{2,32}")
# What each way of signing in carries.
_CREDENTIALS = {
    "CustomKeys": {"keys"},
    "ApiKey": {"key"},
    "None": set(),
    "AAD": set(),
    "PAT": {"pat"},
    "SAS": {"sas"},
    "AccountKey": {"accountKey"},
    "ManagedIdentity": {"clientId", "resourceId"},
}


@route("PUT", ARM, _CONNECTION)
def put_connection(cloud: Cloud, request: Request) -> Reply:
    """Make or replace a connection."""
    need_workspace(cloud, request)
    name, given = request.args["name"], request.json().get("properties") or {}
    if not _NAME.fullmatch(name):
        raise bad(f"The connection name '{name}' is invalid.", "ValidationError")
    _check(given)
    sealed = cloud.seal(given.get("credentials"))
    properties = {k: v for k, v in given.items() if k != "credentials"}
    document = {
        "properties": {**properties, "group": "AzureAI", "createdByWorkspaceArmId": None},
        "systemData": stamps(),
        "_sealed": sealed,
    }
    return Reply(200, public(cloud.put(request.id(_CONNECTION), KIND, document)))


def _check(given: Json) -> None:
    way = given.get("authType")
    if way not in _CREDENTIALS:
        raise bad(f"The authType '{way}' is not supported.", "ValidationError")
    if not given.get("category") or not given.get("target"):
        raise bad("The connection needs a category and a target.", "ValidationError")
    credentials = given.get("credentials") or {}
    missing = _CREDENTIALS[way] - set(credentials)
    if missing:
        raise bad(f"The credentials lack {', '.join(sorted(missing))}.", "ValidationError")
    if way == "CustomKeys":
        values = credentials["keys"]
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise bad("The custom keys must be strings.", "ValidationError")
    metadata = given.get("metadata") or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise bad("The connection's metadata must be strings.", "ValidationError")


@route("GET", ARM, _CONNECTION)
def get_connection(cloud: Cloud, request: Request) -> Reply:
    """One connection, without its secrets."""
    found = _need(cloud, request)
    shown = public(found)
    if found["properties"].get("authType") == "CustomKeys":
        shown["properties"]["credentials"] = None
    return Reply(200, shown)


@route("GET", ARM, WORKSPACE + "/connections")
def list_connections(cloud: Cloud, request: Request) -> Reply:
    """All of a workspace; a project has its hub's shared ones as well."""
    workspace = need_workspace(cloud, request)
    found = cloud.children(workspace["id"], KIND)
    hub = workspace["properties"].get("hubResourceId")
    if hub:
        shared = cloud.children(hub, KIND)
        found += [doc for doc in shared if doc["properties"].get("isSharedToAll")]
    category = request.query.get("category")
    chosen = [d for d in found if not category or d["properties"]["category"] == category]
    return Reply(200, {"value": [public(doc) for doc in chosen]})


@route("POST", ARM, _CONNECTION + "/listsecrets")
def list_connection_secrets(cloud: Cloud, request: Request) -> Reply:
    """One connection with its secrets."""
    found = _need(cloud, request)
    shown = public(found)
    shown["properties"]["credentials"] = cloud.unseal(found["_sealed"])
    return Reply(200, shown)


@route("DELETE", ARM, _CONNECTION)
def delete_connection(cloud: Cloud, request: Request) -> Reply:
    """Delete it."""
    need_workspace(cloud, request)
    if not cloud.get(request.id(_CONNECTION)):
        return Reply(204)
    cloud.delete(request.id(_CONNECTION))
    return Reply(200)


def _need(cloud: Cloud, request: Request) -> Json:
    workspace = need_workspace(cloud, request)
    found = cloud.get(request.id(_CONNECTION))
    hub = workspace["properties"].get("hubResourceId")
    if found is None and hub:
        above = cloud.get(f"{hub}/connections/{request.args['name']}")
        found = above if above and above["properties"].get("isSharedToAll") else None
    if found is None:
        name = request.args["name"]
        raise AzureError(404, "UserError", f"Connection {name} can't be found in this workspace")
    return found
