"""Managed online endpoints: names, keys, tokens, identity and traffic."""

from __future__ import annotations

import re
import time
import uuid

from .cloud import TENANT, Cloud, listed, public, route, stamps
from .servers import stop_server
from .signin import sign
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, bad
from .workspaces import need_workspace

KIND = f"{ML}/workspaces/onlineEndpoints"
DEPLOYMENT_KIND = f"{KIND}/deployments"
ENDPOINT = WORKSPACE + "/onlineEndpoints/{name}"
NAME = re.compile(r"[A-Za-z](?!.*--)[A-Za-z0-9-]{1,30}[A-Za-z0-9]")
_KEY_LIFE = 3600 * 12


@route("PUT", ARM, ENDPOINT)
def put_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Make an endpoint, or change its traffic and tags."""
    workspace, body = need_workspace(cloud, request), request.json()
    name, given = request.args["name"], body.get("properties") or {}
    before = cloud.get(request.id(ENDPOINT))
    _check_endpoint(cloud, workspace, name, given, before)
    document = {
        "location": workspace["location"],
        "tags": body.get("tags") or {},
        "kind": "Managed",
        "identity": _identity(cloud, request.id(ENDPOINT), body.get("identity")),
        "systemData": before["systemData"] if before else stamps(),
        "properties": {
            **given,
            "traffic": _traffic(cloud, request.id(ENDPOINT), given.get("traffic") or {}),
            "publicNetworkAccess": given.get("publicNetworkAccess") or "Enabled",
            "scoringUri": f"https://{name}.{workspace['location']}.inference.ml.azure.com/score",
            "swaggerUri": f"https://{name}.{workspace['location']}.inference.ml.azure.com/"
            "swagger.json",
            "provisioningState": "Updating" if before else "Creating",
        },
        "_keys": before["_keys"] if before else {"primary": 0, "secondary": 0},
    }
    endpoint = cloud.put(request.id(ENDPOINT), KIND, document)
    return cloud.accepted(endpoint, cloud.operate(endpoint), 200 if before else 201)


def _check_endpoint(
    cloud: Cloud, workspace: Json, name: str, given: Json, before: Json | None
) -> None:
    if not 3 <= len(name) <= 32 or not NAME.fullmatch(name):
        raise bad(
            f"The endpoint name '{name}' is invalid: 3 to 32 letters, digits and single dashes, "
            "starting with a letter.",
            "InvalidEndpointName",
        )
    if given.get("authMode") not in ("Key", "AMLToken", "AADToken"):
        raise bad(f"authMode '{given.get('authMode')}' is not supported.", "ValidationError")
    if before and before["properties"]["authMode"] != given["authMode"]:
        raise bad("The authMode of an endpoint cannot be changed.", "ValidationError")
    for other in cloud.children("/subscriptions", KIND):
        same = other["name"].lower() == name.lower() and other is not before
        if same and other["location"] == workspace["location"]:
            raise bad(
                f"The endpoint name '{name}' is taken in region '{workspace['location']}'.",
                "EndpointNameAlreadyExists",
            )
    if before and before["properties"]["provisioningState"] in ("Creating", "Updating", "Deleting"):
        raise AzureError(409, "Conflict", f"The endpoint '{name}' is being changed already.")


def _identity(cloud: Cloud, arm_id: str, given: Json | None) -> Json:
    if given and given.get("userAssignedIdentities"):
        found = {u: cloud.need(u, "identity") for u in given["userAssignedIdentities"]}
        users = {
            user: {k: doc["properties"][k] for k in ("principalId", "clientId")}
            for user, doc in found.items()
        }
        return {"type": "UserAssigned", "userAssignedIdentities": users}
    principal = str(uuid.uuid5(uuid.NAMESPACE_URL, arm_id.lower()))
    return {"type": "SystemAssigned", "principalId": principal, "tenantId": TENANT}


def _traffic(cloud: Cloud, arm_id: str, traffic: Json) -> Json:
    for name in traffic:
        if cloud.get(f"{arm_id}/deployments/{name}") is None:
            raise bad(
                f"The traffic rule names the deployment '{name}', which does not exist.",
                "InvalidTraffic",
            )
    total = sum(traffic.values())
    if total not in (0, 100):
        raise bad(f"The traffic adds up to {total}; expected 0 or 100.", "InvalidTraffic")
    return traffic


@route("PATCH", ARM, ENDPOINT)
def patch_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Change the tags."""
    found = need_endpoint(cloud, request)
    found["tags"] = {**found.get("tags", {}), **(request.json().get("tags") or {})}
    return Reply(200, public(found))


@route("GET", ARM, ENDPOINT)
def get_endpoint(cloud: Cloud, request: Request) -> Reply:
    """One endpoint."""
    return Reply(200, public(need_endpoint(cloud, request)))


@route("GET", ARM, WORKSPACE + "/onlineEndpoints")
def list_endpoints(cloud: Cloud, request: Request) -> Reply:
    """All endpoints of a workspace."""
    return listed(cloud.children(need_workspace(cloud, request)["id"], KIND))


@route("DELETE", ARM, ENDPOINT)
def delete_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Delete an endpoint with its deployments."""
    need_workspace(cloud, request)
    found = cloud.get(request.id(ENDPOINT))
    if found is None:
        return Reply(204)
    for deployment in cloud.children(found["id"], DEPLOYMENT_KIND):
        stop_server(deployment)
    found["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(found, cloud.operate(found, kind="delete"), 202, body=False)


@route("POST", ARM, ENDPOINT + "/listKeys")
def list_keys(cloud: Cloud, request: Request) -> Reply:
    """The two keys."""
    found = need_endpoint(cloud, request)
    if found["properties"]["authMode"] != "Key":
        raise bad("The endpoint does not use keys.", "UserError")
    return Reply(200, {f"{which}Key": key_of(cloud, found, which) for which in found["_keys"]})


@route("POST", ARM, ENDPOINT + "/regenerateKeys")
def regenerate_keys(cloud: Cloud, request: Request) -> Reply:
    """Replace one key."""
    found = need_endpoint(cloud, request)
    which = str(request.json().get("keyType", "")).lower()
    if which not in found["_keys"]:
        raise bad(f"keyType '{which}' is not supported.", "ValidationError")
    found["_keys"][which] += 1
    operation = cloud.operate(found, kind="keys")
    return cloud.accepted(found, operation, 202, body=False)


@route("POST", ARM, ENDPOINT + "/token")
def get_token(cloud: Cloud, request: Request) -> Reply:
    """A token for this endpoint."""
    found = need_endpoint(cloud, request)
    if found["properties"]["authMode"] == "Key":
        raise bad("The endpoint uses keys.", "UserError")
    value = sign(cloud, {"aud": found["id"].lower()}, _KEY_LIFE)
    expires = int(time.time()) + _KEY_LIFE
    times = {"expiryTimeUtc": expires, "refreshAfterTimeUtc": expires - 3600}
    return Reply(200, {"accessToken": value, "tokenType": "Bearer", **times})


def key_of(cloud: Cloud, endpoint: Json, which: str) -> str:
    """A key of an endpoint, in its present generation."""
    return cloud.derive("endpoint", endpoint["id"], which, str(endpoint["_keys"][which]))


def need_endpoint(cloud: Cloud, request: Request) -> Json:
    """The endpoint of the request. Raises AzureError (404)."""
    need_workspace(cloud, request)
    found = cloud.get(request.id(ENDPOINT))
    if found is None:
        name = request.args["name"]
        raise AzureError(404, "ResourceNotFound", f"The endpoint '{name}' was not found.")
    return found
