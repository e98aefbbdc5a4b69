"""What a role allows: Azure's own check of each call, for everybody but the caller that signs in.

That caller stands for an owner of the subscription. Identities (of workflows, of endpoints) may do
what the roles allow that they were assigned at the call's resource or above it.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

from .cloud import Cloud
from .identity import CALLER, roles_of
from .wire import ARM, ML, AzureError, Request

_VERBS = {"GET": "read", "HEAD": "read", "PUT": "write", "PATCH": "write", "DELETE": "delete"}


class Role(NamedTuple):
    """Patterns of the actions that a role allows, and of those that it leaves out."""

    actions: tuple[str, ...]
    not_actions: tuple[str, ...] = ()


_WS, _AUTH = f"{ML}/workspaces", "Microsoft.Authorization"
_UAI = "Microsoft.ManagedIdentity/userAssignedIdentities"
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
    "Managed Identity Operator": Role((f"{_UAI}/*read", f"{_UAI}/*assign/action")),
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
        assign = f"{_UAI}/assign/action"
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
