"""User-assigned identities, role assignments, and what a principal may do.

Only what an online deployment needs is enforced: pulling images and reading blobs.
"""

from __future__ import annotations

import re
import uuid

from .cloud import TENANT, Cloud, listed, public, route
from .regions import check_location, need_group
from .wire import ARM, GROUP, AzureError, Json, Reply, Request, bad

_UAI = GROUP + "/providers/Microsoft.ManagedIdentity/userAssignedIdentities/{name}"
_UAI_KIND = "Microsoft.ManagedIdentity/userAssignedIdentities"
_ROLE = "/{scope*}/providers/Microsoft.Authorization/roleAssignments"
_ROLE_KIND = "Microsoft.Authorization/roleAssignments"
_DEFINITIONS = "/providers/Microsoft.Authorization/roleDefinitions"
ROLES = {
    "b24988ac-6180-42a0-ab88-20f7382dd24c": "Contributor",
    "8e3af657-a8ff-443c-a75c-2fe8c4bcb635": "Owner",
    "acdd72a7-3385-48ef-bd42-f606fba81ae7": "Reader",
    "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1": "Storage Blob Data Reader",
    "ba92f5b4-2d11-453d-a403-e96b0029c9fe": "Storage Blob Data Contributor",
    "7f951dda-4ed3-4680-a7ca-43fe172d538d": "AcrPull",
    "f6c7c914-8db3-469d-8ca1-694a8f32e121": "AzureML Data Scientist",
    "e503ece1-11d0-4e8e-8e2c-7a6c3bf38815": "AzureML Compute Operator",
    "635dd51f-9968-44d3-b7fb-6d9a6bd613ae": "AzureML Metrics Writer (preview)",
    "ea01e6af-a1c1-4350-9563-ad00f8c72ec5": "Azure Machine Learning Workspace Connection Secrets "
    "Reader",
}
PULLS_IMAGES = {"AcrPull", "Contributor", "Owner"}
READS_BLOBS = {"Storage Blob Data Reader", "Storage Blob Data Contributor"}
_GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@route("PUT", ARM, _UAI)
def put_identity(cloud: Cloud, request: Request) -> Reply:
    """Make a user-assigned identity."""
    need_group(cloud, request)
    name, body = request.args["name"], request.json()
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{2,127}", name):
        raise bad(f"The identity name '{name}' is invalid.", "InvalidResourceName")
    arm_id = request.id(_UAI)
    before = cloud.get(arm_id)
    document = {
        "location": check_location(body.get("location")),
        "tags": body.get("tags") or {},
        "properties": {
            "tenantId": TENANT,
            "principalId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"principal {arm_id.lower()}")),
            "clientId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"client {arm_id.lower()}")),
        },
    }
    return Reply(200 if before else 201, public(cloud.put(arm_id, _UAI_KIND, document)))


@route("GET", ARM, _UAI)
def get_identity(cloud: Cloud, request: Request) -> Reply:
    """One identity."""
    return Reply(200, public(cloud.need(request.id(_UAI), _UAI_KIND)))


@route("DELETE", ARM, _UAI)
def delete_identity(cloud: Cloud, request: Request) -> Reply:
    """Delete it; its role assignments stay and name nobody, as on Azure."""
    if not cloud.get(request.id(_UAI)):
        return Reply(204)
    cloud.delete(request.id(_UAI))
    return Reply(200)


@route("PUT", ARM, _ROLE + "/{guid}")
def put_assignment(cloud: Cloud, request: Request) -> Reply:
    """Assign a role; the same assignment under another name is refused."""
    scope, guid = "/" + request.args["scope"], request.args["guid"]
    given = request.json().get("properties") or {}
    _check_assignment(cloud, scope, guid, given)
    arm_id = request.id(_ROLE + "/{guid}")
    for other in cloud.children(scope + "/providers/Microsoft.Authorization", _ROLE_KIND):
        same = _same_assignment(other, given)
        if other["name"].lower() == guid.lower():
            if same:
                return Reply(200, public(other))
            raise AzureError(
                409,
                "RoleAssignmentUpdateNotPermitted",
                "Tenant ID, application ID, principal ID, and scope are not allowed to be updated.",
            )
        if same:
            raise _exists(other)
    properties = {
        "roleDefinitionId": given["roleDefinitionId"],
        "principalId": given["principalId"],
        "principalType": given.get("principalType") or "User",
        "scope": scope,
    }
    return Reply(201, public(cloud.put(arm_id, _ROLE_KIND, {"properties": properties})))


def _same_assignment(doc: Json, given: Json) -> bool:
    return all(
        str(doc["properties"][key]).rsplit("/", 1)[-1].lower()
        == str(given[key]).rsplit("/", 1)[-1].lower()
        for key in ("roleDefinitionId", "principalId")
    )


def _exists(doc: Json) -> AzureError:
    return AzureError(
        409,
        "RoleAssignmentExists",
        f"The role assignment already exists. The ID of the existing role assignment is "
        f"{doc['name'].replace('-', '')}.",
    )


def _check_assignment(cloud: Cloud, scope: str, guid: str, given: Json) -> None:
    if not _GUID.fullmatch(guid):
        raise bad(
            f"The role assignment ID '{guid}' is not valid. The role assignment ID must be a GUID.",
            "InvalidRoleAssignmentId",
        )
    if len(scope.split("/")) > 3:
        cloud.need(scope, "scope")
    role = str(given.get("roleDefinitionId", "")).rsplit("/", 1)[-1].lower()
    if role not in ROLES:
        raise bad(f"The role definition '{role}' does not exist.", "RoleDefinitionDoesNotExist")
    principal = given.get("principalId", "")
    known = {
        str(doc["properties"].get("principalId") or (doc.get("identity") or {}).get("principalId"))
        for doc in cloud.children("/subscriptions")
        if doc["type"] != _ROLE_KIND
    }
    if given.get("principalType") in (None, "User") and principal in known:
        raise AzureError(
            400,
            "UnmatchedPrincipalType",
            f"The PrincipalId '{principal}' has type 'ServicePrincipal', which is different from "
            "specified PrinciaplType 'User'.",
        )


@route("GET", ARM, _ROLE + "/{guid}")
def get_assignment(cloud: Cloud, request: Request) -> Reply:
    """One role assignment."""
    arm_id = request.id(_ROLE + "/{guid}")
    if not cloud.get(arm_id):
        raise AzureError(
            404, "RoleAssignmentNotFound", f"The role assignment '{arm_id}' is not found."
        )
    return Reply(200, public(cloud.need(arm_id)))


@route("DELETE", ARM, _ROLE + "/{guid}")
def delete_assignment(cloud: Cloud, request: Request) -> Reply:
    """Take a role away."""
    found = cloud.get(request.id(_ROLE + "/{guid}"))
    if found is None:
        return Reply(204)
    cloud.delete(found["id"])
    return Reply(200, public(found))


@route("GET", ARM, _ROLE)
def list_assignments(cloud: Cloud, request: Request) -> Reply:
    """Those at, above and (without `atScope()`) below a scope."""
    scope = "/" + request.args["scope"].lower()
    query = request.query.get("$filter", "")
    wanted = re.search(r"(?:principalId|assignedTo)\D{1,6}?'?\(?'?([0-9a-f-]{36})", query)
    found = []
    for doc in cloud.children("/subscriptions", _ROLE_KIND):
        own = doc["properties"]["scope"].lower()
        below = own.startswith(scope) and "atScope()" not in query
        near = (scope + "/").startswith(own.rstrip("/") + "/") or below
        if near and (not wanted or doc["properties"]["principalId"] == wanted.group(1)):
            found.append(doc)
    return listed(found)


@route("GET", ARM, "/{scope*}" + _DEFINITIONS)
def list_definitions(_cloud: Cloud, request: Request) -> Reply:
    """The roles that are known here."""
    scope = "/" + request.args["scope"]
    name = re.search(r"roleName eq '([^']+)'", request.query.get("$filter", ""))
    roles = {g: n for g, n in ROLES.items() if not name or n == name.group(1)}
    return Reply(
        200,
        {
            "value": [
                {
                    "id": f"{scope}{_DEFINITIONS}/{guid}",
                    "name": guid,
                    "type": "Microsoft.Authorization/roleDefinitions",
                    "properties": {"roleName": role, "type": "BuiltInRole", "permissions": []},
                }
                for guid, role in roles.items()
            ]
        },
    )


def roles_of(cloud: Cloud, principal: str, scope: str) -> set[str]:
    """The names of the roles that `principal` has at `scope` or above."""
    names = set()
    for doc in cloud.children("/subscriptions", _ROLE_KIND):
        properties = doc["properties"]
        own = properties["scope"].lower().rstrip("/") + "/"
        if properties["principalId"] == principal and (scope.lower() + "/").startswith(own):
            names.add(ROLES[properties["roleDefinitionId"].rsplit("/", 1)[-1].lower()])
    return names
