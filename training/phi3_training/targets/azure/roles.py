"""Role assignments of the user-assigned identity, under names that are the same each time.

The tutorials' set, or with `azure.least_privilege` only what a deployment and a flow need.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from .clients import Clients
from .failures import code_of, stage_error
from .waiting import TRIES, look, passing

# Role definitions have the same ids everywhere.
ROLES = {
    "Contributor": "b24988ac-6180-42a0-ab88-20f7382dd24c",
    "Storage Blob Data Reader": "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1",
    "AcrPull": "7f951dda-4ed3-4680-a7ca-43fe172d538d",
    "Azure Machine Learning Workspace Connection Secrets Reader": (
        "ea01e6af-a1c1-4350-9563-ad00f8c72ec5"
    ),
}
SECRETS_READER = "Azure Machine Learning Workspace Connection Secrets Reader"
_NAMES = uuid.UUID("5b1f6c0e-6f0c-5b7e-9a51-1e0c1a7d3f42")  # ours; names are drawn below it


@dataclass(frozen=True)
class Grant:
    """One role for one identity on one scope."""

    role: str
    scope: str
    principal_id: str
    why: str

    @property
    def name(self) -> str:
        """A GUID made from scope, role and identity, so that a second run repeats it."""
        parts = (self.scope, ROLES[self.role], self.principal_id)
        return str(uuid.uuid5(_NAMES, "|".join(parts).lower()))

    def body(self, subscription_id: str) -> Any:
        """What is sent. The type keeps Azure from looking up an identity it may not know yet."""
        from azure.mgmt.authorization.v2022_04_01.models import RoleAssignmentCreateParameters

        definition = "providers/Microsoft.Authorization/roleDefinitions"
        return RoleAssignmentCreateParameters(
            role_definition_id=f"/subscriptions/{subscription_id}/{definition}/{ROLES[self.role]}",
            principal_id=self.principal_id,
            principal_type="ServicePrincipal",
        )


def grants(
    principal_id: str,
    *,
    group: str,
    storage: str,
    registry: str | None,
    connections: list[str],
    least_privilege: bool,
) -> list[Grant]:
    """What the identity gets; the scopes are ARM ids."""
    wide = [] if least_privilege else [("Contributor", group, "as in the tutorials")]
    wanted = [
        *wide,
        ("Storage Blob Data Reader", storage, "the deployment reads the model"),
        *([("AcrPull", registry, "the deployment pulls its image")] if registry else []),
        *((SECRETS_READER, scope, "flows read the connection's key") for scope in connections),
    ]
    return [Grant(role, scope, principal_id, why) for role, scope, why in wanted]


def grant(clients: Clients, wanted: Grant) -> str:
    """Assign the role; `exists` or `created`. StageError with the mend when Azure refuses."""
    from azure.core.exceptions import AzureError

    operations = clients.authorization.role_assignments
    doing = f"Giving the identity the role {wanted.role}"
    found = look(lambda: operations.get(wanted.scope, wanted.name), doing)
    if found is not None:
        return "exists"
    body = wanted.body(clients.workplace.subscription_id)
    for left in reversed(range(TRIES)):
        try:
            operations.create(wanted.scope, wanted.name, body)
        except AzureError as error:
            code = (code_of(error) or "").lower()
            if code == "roleassignmentexists":  # made by somebody else under another name
                return "exists"
            if not left or not (passing(error) or code == "principalnotfound"):
                raise stage_error(error, doing) from None
        else:
            return "created"
        time.sleep(clients.poll.interval)
    raise AssertionError("unreachable")
