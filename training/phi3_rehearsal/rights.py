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
    action = action_of(request.method, request.path)
    for name in roles_of(cloud, principal, request.path):
        role = ALLOWED.get(name, Role(()))
        if _fits(action, role.actions) and not _fits(action, role.not_actions):
            return
    raise AzureError(
        403,
        "AuthorizationFailed",
        f"The client '{principal}' with object id '{principal}' does not have authorization to "
        f"perform action '{action}' over scope '{request.path}'.",
    )


def _fits(action: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(action.lower(), pattern.lower()) for pattern in patterns)
