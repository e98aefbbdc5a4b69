"""Who may do what: sign-in as Microsoft Entra ID does it, managed identities, roles.

Tokens are signed with the rehearsal's seed. The caller that signs in stands for an owner of the
subscription and may do everything. Identities (of workflows, of endpoints) may do what the roles
allow that they were assigned at the call's resource or above it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
import uuid
from fnmatch import fnmatchcase
from typing import NamedTuple
from urllib.parse import parse_qsl

from .cloud import Cloud, check_location, listed, need_group, on_get, public, route
from .offers import ROLES
from .wire import ARM, GROUP, ML, AzureError, Json, Reply, Request, bad

# The made-up service principal that the caller signs in as, and its id in role assignments.
TENANT = "7e4ea25a-0000-4000-8000-7e4ea25a0000"
CLIENT = "c11e4700-0000-4000-8000-c11e47000000"
CALLER = "0b1ec700-0000-4000-8000-0b1ec7000000"
LOGIN = "login.microsoftonline.com"
_TOKEN_SECONDS = 3600  # Entra's tokens are good for 60 to 90 minutes
# Whom a token must be for, by the names that `route` uses.
_MANAGEMENT = ("https://management.azure.com", "https://management.core.windows.net")
AUDIENCES = {
    "management": _MANAGEMENT,
    "regional": (*_MANAGEMENT, "https://ml.azure.com"),
    "ml": ("https://ml.azure.com",),
    "storage": ("https://storage.azure.com",),
}


@route("GET", LOGIN, "/{tenant}/v2.0/.well-known/openid-configuration", audience="")
def openid_configuration(_cloud: Cloud, request: Request) -> Reply:
    """Where to get a token."""
    base = f"https://{LOGIN}/{request.args['tenant']}"
    paths = {
        "token_endpoint": "oauth2/v2.0/token",
        "authorization_endpoint": "oauth2/v2.0/authorize",
        "device_authorization_endpoint": "oauth2/v2.0/devicecode",
        "issuer": "v2.0",
        "jwks_uri": "discovery/v2.0/keys",
    }
    return Reply(200, {name: f"{base}/{path}" for name, path in paths.items()})


@route("POST", LOGIN, "/{tenant}/oauth2/v2.0/token", audience="")
def sign_in(cloud: Cloud, request: Request) -> Reply:
    """A token for the service principal, if its secret is right."""
    form = dict(parse_qsl(request.body.decode("utf-8", "replace")))
    # A service principal alone: nobody sits at a browser here, and no device code is confirmed.
    if form.get("grant_type") != "client_credentials":
        text = "AADSTS70003: The app requested an unsupported grant type."
        return Reply(400, {"error": "unsupported_grant_type", "error_description": text})
    secret, own = form.get("client_secret", "").encode(), client_secret(cloud).encode()
    if form.get("client_id") != CLIENT or not hmac.compare_digest(secret, own):
        text = "AADSTS7000215: Invalid client secret provided."
        return Reply(401, {"error": "invalid_client", "error_description": text})
    audience = form.get("scope", "").split(" ")[0].removesuffix("/.default")
    claims = {"tid": request.args["tenant"], "appid": CLIENT}
    token = token_for(cloud, CALLER, audience, **claims)
    answer = {"token_type": "Bearer", "expires_in": _TOKEN_SECONDS, "access_token": token}
    return Reply(200, answer, {"Cache-Control": "no-store"})


def token_for(cloud: Cloud, principal: str, audience: str, **claims: str) -> str:
    """A token of a principal (its object id) for an audience, as Entra gives it out."""
    now = int(time.time())
    times = {"iat": now, "nbf": now - 60, "exp": now + _TOKEN_SECONDS}
    own: Json = {"tid": TENANT, **claims, "aud": audience, "oid": principal, **times}
    text = f"{_encode({'alg': 'HS256', 'typ': 'JWT'})}.{_encode(own)}"
    return f"{text}.{_signature(cloud, text)}"


def client_secret(cloud: Cloud) -> str:
    """The secret of the made-up service principal."""
    return cloud.derive("client-secret")


def claims_of(cloud: Cloud, value: str) -> Json | None:
    """The claims of a token that was signed here and has not expired; None for others."""
    text, _, signature = value.rpartition(".")
    if not text or not hmac.compare_digest(signature.encode(), _signature(cloud, text).encode()):
        return None
    part = text.split(".")[1]
    claims: Json = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims if claims["exp"] > time.time() else None


def check_token(cloud: Cloud, request: Request, audience: str) -> Json | None:
    """The claims of the call's token for `audience`, or AzureError (401); None for "" (anybody)."""
    if not audience:
        return None
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not value:
        text = "The 'Authorization' header is missing or invalid."
        raise AzureError(401, "AuthenticationFailed", text)
    claims = claims_of(cloud, value)
    if claims is None:
        text = "The access token is invalid or has expired."
        raise AzureError(401, "ExpiredAuthenticationToken", text)
    wanted = AUDIENCES[audience]
    if claims["aud"].rstrip("/") not in wanted:
        text = f"The access token has the wrong audience '{claims['aud']}'; expected '{wanted[0]}'."
        raise AzureError(401, "InvalidAuthenticationTokenAudience", text)
    return claims


def _encode(value: Json) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def _signature(cloud: Cloud, text: str) -> str:
    key = cloud.derive("token-signature").encode()
    # Symmetric, where Entra signs with RSA: nobody but this rehearsal checks a signature.
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


# --- user-assigned identities and role assignments ---

_UAI = GROUP + "/providers/Microsoft.ManagedIdentity/userAssignedIdentities/{name}"
_UAI_KIND = "Microsoft.ManagedIdentity/userAssignedIdentities"
_ROLE = "/{scope*}/providers/Microsoft.Authorization/roleAssignments"
_ROLE_KIND = "Microsoft.Authorization/roleAssignments"
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


on_get(_UAI, lambda cloud, request: cloud.need(request.id(_UAI), _UAI_KIND))


@route("DELETE", ARM, _UAI)
def delete_identity(cloud: Cloud, request: Request) -> Reply:
    """Delete it; its role assignments stay and name nobody, as on Azure."""
    return cloud.delete_now(request.id(_UAI))


@route("PUT", ARM, _ROLE + "/{guid}")
def put_assignment(cloud: Cloud, request: Request) -> Reply:
    """Assign a role; the same assignment is refused under another name (a GUID)."""
    scope, guid = "/" + request.args["scope"], request.args["guid"]
    given = request.json().get("properties") or {}
    if not _GUID.fullmatch(guid):
        text = (
            f"The role assignment ID '{guid}' is not valid. The role assignment ID must be a GUID."
        )
        raise bad(text, "InvalidRoleAssignmentId")
    if len(scope.split("/")) > 3:  # every subscription exists in a rehearsal
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
    # azure-mgmt-authorization sends "User" where the caller says nothing, and Azure then looks for
    # a person of that id.
    if given.get("principalType") in (None, "User") and principal in known:
        text = f"The PrincipalId '{principal}' has type 'ServicePrincipal', which is different "
        raise bad(text + "from specified PrinciaplType 'User'.", "UnmatchedPrincipalType")

    def role_and_principal(properties: Json) -> list[str]:
        values = (str(properties[key]) for key in ("roleDefinitionId", "principalId"))
        return [value.rsplit("/", 1)[-1].lower() for value in values]

    for other in cloud.children(scope + "/providers/Microsoft.Authorization", _ROLE_KIND):
        same = role_and_principal(other["properties"]) == role_and_principal(given)
        if other["name"].lower() == guid.lower():
            if same:
                return Reply(200, public(other))
            text = "Tenant ID, application ID, principal ID, and scope are not allowed to be "
            raise AzureError(409, "RoleAssignmentUpdateNotPermitted", text + "updated.")
        if same:
            text = "The role assignment already exists. The ID of the existing role assignment is "
            text += other["name"].replace("-", "") + "."
            raise AzureError(409, "RoleAssignmentExists", text)
    properties = {
        "roleDefinitionId": given["roleDefinitionId"],
        "principalId": given["principalId"],
        "principalType": given.get("principalType") or "User",
        "scope": scope,
    }
    return Reply(
        201,
        public(cloud.put(request.id(_ROLE + "/{guid}"), _ROLE_KIND, {"properties": properties})),
    )


on_get(
    _ROLE + "/{guid}",
    lambda cloud, request: cloud.need(
        request.id(_ROLE + "/{guid}"),
        code="RoleAssignmentNotFound",
        message=f"The role assignment '{request.args['guid']}' is not found.",
    ),
)


@route("DELETE", ARM, _ROLE + "/{guid}")
def delete_assignment(cloud: Cloud, request: Request) -> Reply:
    """Take a role away."""
    assignment = cloud.get(request.id(_ROLE + "/{guid}"))
    if assignment is None:
        return Reply(204)
    cloud.delete(assignment["id"])
    return Reply(200, public(assignment))


@route("GET", ARM, _ROLE)
def list_assignments(cloud: Cloud, request: Request) -> Reply:
    """Those at, above and (without `atScope()`) below a scope."""
    scope = "/" + request.args["scope"].lower()
    query = request.query.get("$filter", "")
    wanted = re.search(r"(?:principalId|assignedTo)\D{1,6}?'?\(?'?([0-9a-f-]{36})", query)
    docs = []
    for doc in cloud.children("/subscriptions", _ROLE_KIND):
        own = doc["properties"]["scope"].lower()
        below = own.startswith(scope) and "atScope()" not in query
        near = (scope + "/").startswith(own.rstrip("/") + "/") or below
        if near and (not wanted or doc["properties"]["principalId"] == wanted.group(1)):
            docs.append(doc)
    return listed(docs)


def user_identities(cloud: Cloud, users: Json) -> Json:
    """`userAssignedIdentities` as Azure answers it. Raises AzureError (404)."""
    known = {user: cloud.need(user, "identity")["properties"] for user in users}
    return {u: {k: p[k] for k in ("principalId", "clientId")} for u, p in known.items()}


def roles_of(cloud: Cloud, principal: str, scope: str) -> set[str]:
    """The names of the roles that `principal` has at `scope` or above."""
    names = set()
    for doc in cloud.children("/subscriptions", _ROLE_KIND):
        properties = doc["properties"]
        own = properties["scope"].lower().rstrip("/") + "/"
        if properties["principalId"] == principal and (scope.lower() + "/").startswith(own):
            names.add(ROLES[properties["roleDefinitionId"].rsplit("/", 1)[-1].lower()])
    return names


# --- what a role allows: Azure's own check of each call ---

_VERBS = {"GET": "read", "HEAD": "read", "PUT": "write", "PATCH": "write", "DELETE": "delete"}


class Role(NamedTuple):
    """Patterns of the actions that a role allows, and of those that it leaves out."""

    actions: tuple[str, ...]
    not_actions: tuple[str, ...] = ()


_WS, _AUTH = f"{ML}/workspaces", "Microsoft.Authorization"
# "Azure built-in roles" (learn.microsoft.com/azure/role-based-access-control/built-in-roles), the
# control plane's actions. A role that is not here allows nothing there.
ALLOWED = {
    "Owner": Role(("*",)),
    "Contributor": Role(("*",), (f"{_AUTH}/*/Delete", f"{_AUTH}/*/Write")),
    "Reader": Role(("*/read",)),
    "AzureML Data Scientist": Role(
        (f"{_WS}/*/read", f"{_WS}/*/action", f"{_WS}/*/delete", f"{_WS}/*/write"),
        (
            *(f"{_WS}/delete", f"{_WS}/write", f"{_WS}/listKeys/action"),
            # `computes/*/delete` in the role's text; it also keeps computes themselves.
            *(f"{_WS}/computes/*delete", f"{_WS}/computes/*write"),
            f"{_WS}/computes/listKeys/action",
            *(f"{_WS}/hubs/delete", f"{_WS}/hubs/write"),
            *(f"{_WS}/featurestores/delete", f"{_WS}/featurestores/write"),
        ),
    ),
    # `*/assign/action` in the role's text; it also allows that on the identity itself.
    "Managed Identity Operator": Role((f"{_UAI_KIND}/*read", f"{_UAI_KIND}/*assign/action")),
    "Search Service Contributor": Role(("Microsoft.Search/searchServices/*",)),
}


def action_of(method: str, path: str) -> str:
    """The action that a call is: provider, types and what is done to them."""
    if "/providers/" not in path:
        return f"Microsoft.Resources/subscriptions/resourceGroups/{_VERBS.get(method, 'action')}"
    namespace, *parts = path.rsplit("/providers/", 1)[1].strip("/").split("/")
    # Types and names take turns; after a POST's last name comes what is asked for (listKeys).
    return "/".join([namespace, *parts[::2], _VERBS.get(method, "action")])


def check_right(cloud: Cloud, principal: str, request: Request) -> None:
    """Raise AzureError (403) unless a role of the principal allows the call."""
    if principal == CALLER or request.host != ARM:
        return
    client = f"The client '{principal}' with object id '{principal}'"
    action = action_of(request.method, request.path)
    if not _may(cloud, principal, action, request.path):
        text = f"{client} does not have authorization to perform action '{action}' over scope "
        raise AzureError(403, "AuthorizationFailed", f"{text}'{request.path}'.")
    if request.method not in ("PUT", "PATCH"):
        return
    # Whoever gives a resource an identity must be allowed to use that, also where it had it before
    # ("Assign a managed identity access", linked access checks of the resource manager).
    for user in (request.json().get("identity") or {}).get("userAssignedIdentities") or {}:
        assign = f"{_UAI_KIND}/assign/action"
        if not _may(cloud, principal, assign, user):
            text = f"{client} has permission to perform action '{action}' on scope "
            text += f"'{request.path}'; however, it does not have permission to perform action "
            text += f"'{assign}' on the linked scope(s) '{user}'."
            raise AzureError(403, "LinkedAuthorizationFailed", text)


def _may(cloud: Cloud, principal: str, action: str, scope: str) -> bool:
    """Whether a role of the principal at the scope or above it allows the action."""
    for name in roles_of(cloud, principal, scope):
        role = ALLOWED.get(name, Role(()))
        if _fits(action, role.actions) and not _fits(action, role.not_actions):
            return True
    return False


def _fits(action: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(action.lower(), pattern.lower()) for pattern in patterns)
