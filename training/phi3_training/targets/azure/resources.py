"""The ARM resources that phi3 makes around a workspace, and the roles of its identity.

One table says type, API version and body of each; `provision` makes them and `teardown` deletes
them. Each is made by PUT on its own id, under a name derived from the workspace's id, so that a
second run after a lost answer finds what the first one made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import StageError
from ...progress import Progress, note
from .clients import Clients
from .failures import code_of, explained, stage_error
from .operations import TRIES, Outcome, create, get_or_none, is_transient, side_by_side
from .place import Place

if TYPE_CHECKING:
    from azure.ai.ml.entities import Workspace
    from azure.mgmt.authorization.v2022_04_01.models import RoleAssignmentCreateParameters

# ARM's answer about a subscription, for its tenant; and connections of a workspace. The other API
# versions are in the table below; everything else is left to the SDKs.
SUBSCRIPTION_API, CONNECTIONS_API = "2022-12-01", "2024-04-01"
Body = dict[str, Any]  # of a resource, as ARM's JSON has it
StepRunner = Callable[[str, str, Callable[[], Outcome]], bool]


@dataclass(frozen=True)
class ResourceKind:
    """A kind of resource of which phi3 makes one; `field` names it in Place."""

    what: str
    arm_type: str
    api_version: str
    field: str

    def name(self, place: Place) -> str:
        """The resource's name."""
        return str(getattr(place, self.field))

    def id(self, place: Place) -> str:
        """The resource's ARM id."""
        return place.resource_id(self.arm_type, self.name(place))


IDENTITY = ResourceKind(
    "identity", "Microsoft.ManagedIdentity/userAssignedIdentities", "2023-01-31", "identity"
)
REGISTRY = ResourceKind(
    "container registry",
    "Microsoft.ContainerRegistry/registries",
    "2023-07-01",
    "container_registry",
)
INSIGHTS = ResourceKind(
    "application insights", "Microsoft.Insights/components", "2020-02-02", "application_insights"
)
LOGS = ResourceKind(
    "log analytics", "Microsoft.OperationalInsights/workspaces", "2022-10-01", "log_analytics"
)
VAULT = ResourceKind("key vault", "Microsoft.KeyVault/vaults", "2023-07-01", "key_vault")
STORAGE = ResourceKind(
    "storage account", "Microsoft.Storage/storageAccounts", "2023-05-01", "storage_account"
)
# Insights writes into log analytics, so it goes before; the rest do not know each other.
DELETION_ORDER = (IDENTITY, REGISTRY, INSIGHTS, LOGS, VAULT, STORAGE)
# Azure keeps these for a while after they are deleted, and their names with them.
SOFT_DELETED = {
    VAULT.what: "retained for up to 90 days with its name; az keyvault purge --name {name} frees "
    "the name, az keyvault recover restores it",
    LOGS.what: "retained for 14 days; creating one with that name restores it",
}


@dataclass(frozen=True)
class Dependents:
    """The ARM ids of what a workspace is made on."""

    storage_account: str
    key_vault: str
    application_insights: str | None
    container_registry: str | None

    def as_arguments(self) -> dict[str, Any]:
        """As the SDK's Workspace and Hub take them."""
        return {key: value for key, value in asdict(self).items() if value}

    def named(self) -> list[tuple[str, str]]:
        """(what, name) of each."""
        return [
            (key.replace("_", " "), last_part(value)) for key, value in self.as_arguments().items()
        ]


def last_part(arm_id: str) -> str:
    """The name at the end of an ARM id."""
    return arm_id.rstrip("/").rsplit("/", 1)[-1]


def dependents_of(workspace: Workspace | None, place: Place) -> Dependents:
    """What an existing workspace is made on; for None, what phi3 would have made it on."""
    if workspace is None:
        return Dependents(
            STORAGE.id(place), VAULT.id(place), INSIGHTS.id(place), REGISTRY.id(place)
        )
    return Dependents(
        storage_account=workspace.storage_account or STORAGE.id(place),
        key_vault=workspace.key_vault or VAULT.id(place),
        application_insights=workspace.application_insights,
        container_registry=workspace.container_registry,
    )


def ensure_dependents(
    clients: Clients, tags: dict[str, str], progress: Progress, step: StepRunner
) -> Dependents | None:
    """Make what is missing; None when a step failed."""
    place = clients.place
    # Each body is made only where it is needed, since the vault's asks Azure for the tenant.
    bodies: dict[ResourceKind, Callable[[], Body]] = {
        STORAGE: lambda: {
            "kind": "StorageV2",
            "sku": {"name": "Standard_LRS"},  # three copies in one data centre: the cheapest
            "properties": {
                # No blob without a sign-in, a key or a signature: chats and models are in here.
                "allowBlobPublicAccess": False,
                "minimumTlsVersion": "TLS1_2",
                "supportsHttpsTrafficOnly": True,
            },
        },
        VAULT: lambda: {
            "properties": {
                "tenantId": _tenant(clients),
                "sku": {"family": "A", "name": "standard"},
                # By role assignments, like everything else here; the older access policies cannot
                # be limited to one secret.
                "accessPolicies": [],
                "enableRbacAuthorization": True,
            }
        },
        LOGS: lambda: {"properties": {"sku": {"name": "PerGB2018"}, "retentionInDays": 30}},
        # Insights without a log analytics workspace ("classic") was retired in February 2024.
        INSIGHTS: lambda: {
            "kind": "web",
            "properties": {"Application_Type": "web", "WorkspaceResourceId": LOGS.id(place)},
        },
        # A workspace that signs in with its own identity needs the registry's admin user.
        REGISTRY: lambda: {"sku": {"name": "Basic"}, "properties": {"adminUserEnabled": True}},
    }

    def ensure(kinds: tuple[ResourceKind, ...], shown: Progress) -> bool:
        return all(
            step(
                kind.what,
                kind.name(place),
                partial(
                    ensure_resource,
                    clients,
                    f"{kind.what} {kind.name(place)}",
                    kind.id(place),
                    kind.api_version,
                    body,
                    tags,
                    shown,
                ),
            )
            for kind, body in bodies.items()
            if kind in kinds
        )

    # Side by side, but insights after the log analytics that it names.
    chains = ((STORAGE,), (VAULT,), (LOGS, INSIGHTS), (REGISTRY,))
    works = {kinds[-1].what: partial(ensure, kinds) for kinds in chains}
    return dependents_of(None, place) if all(side_by_side(progress, works).values()) else None


def ensure_group(clients: Clients, tags: dict[str, str], progress: Progress) -> Outcome:
    """Create the place's resource group where it is missing. StageError with the fix."""
    groups, place = clients.resources.resource_groups, clients.place
    doing = f"Creating the resource group {place.resource_group}"
    if get_or_none(lambda: groups.get(place.resource_group), doing) is not None:
        return "exists"
    body: Any = {"location": place.location, "tags": tags}
    poll = clients.poll
    create(
        doing,
        lambda: groups.create_or_update(place.resource_group, body),
        lambda: groups.get(place.resource_group),
        progress,
        limit=poll.provision_timeout,
        pause=poll.interval,
    )
    return "created"


def ensure_resource(
    clients: Clients,
    what: str,
    resource_id: str,
    api_version: str,
    own_body: Callable[[], Body],
    tags: dict[str, str],
    progress: Progress,
) -> Outcome:
    """Create a resource where none has its id; `what` names it. StageError with the fix."""
    from azure.core.exceptions import HttpResponseError

    resources = clients.resources.resources
    doing = f"Creating the {what}"

    def read() -> object:
        return resources.get_by_id(resource_id, api_version=api_version)

    def put(body: Any) -> object:  # the SDK asks for a model of its own, and takes JSON
        return resources.begin_create_or_update_by_id(resource_id, body, api_version=api_version)

    def start() -> object:
        body = {"location": clients.place.location, "tags": tags, **own_body()}
        try:
            return put(body)
        except HttpResponseError as error:
            if (code_of(error) or "").lower() == "missingsubscriptionregistration":
                namespace = resource_id.split("/providers/")[1].split("/")[0]
                register_provider(clients, namespace, progress)
            elif error.status_code == 409 and "deleted state" in str(error).lower():
                # A deleted key vault keeps its name for up to 90 days; ours is recovered.
                body["properties"] = {**body["properties"], "createMode": "recover"}
            else:
                raise
        return put(body)

    if get_or_none(read, doing) is not None:
        return "exists"
    poll = clients.poll
    create(doing, start, read, progress, limit=poll.provision_timeout, pause=poll.interval)
    return "created"


def register_provider(clients: Clients, namespace: str, progress: Progress) -> None:
    """Register a resource provider, which a subscription must do once."""
    # That takes a minute or two.
    providers = clients.resources.providers
    with explained(f"Registering the provider {namespace}"):
        provider = providers.register(namespace)
        ends = time.monotonic() + clients.poll.provision_timeout
        while str(provider.registration_state).lower() != "registered":
            if time.monotonic() > ends:
                raise StageError(
                    f"The provider {namespace} is not registered yet; run the same command again"
                )
            note(progress, f"registering {namespace}")
            time.sleep(clients.poll.interval)
            provider = providers.get(namespace)


def _tenant(clients: Clients) -> str:
    """The tenant of the subscription: a key vault belongs to one."""
    place = clients.place
    if place.tenant_id is not None:
        return place.tenant_id
    with explained("Looking up the subscription's tenant"):
        by_id = clients.resources.resources.get_by_id
        subscription: Any = by_id(place.subscription_scope, api_version=SUBSCRIPTION_API)
    if not subscription.get("tenantId"):
        raise StageError("The subscription's tenant is unknown: set azure.tenant_id=GUID")
    return str(subscription["tenantId"])


# "Azure built-in roles": a role's id is the same in every tenant.
ROLES = {
    "Contributor": "b24988ac-6180-42a0-ab88-20f7382dd24c",
    "Storage Blob Data Reader": "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1",
    "Search Service Contributor": "7ca78c08-252a-4471-8644-bb5ff32d4ba0",
    "Search Index Data Contributor": "8ebe5a00-799e-43f5-93ac-243d3dce84a7",
    "AcrPull": "7f951dda-4ed3-4680-a7ca-43fe172d538d",
    "Azure Machine Learning Workspace Connection Secrets Reader": (
        "ea01e6af-a1c1-4350-9563-ad00f8c72ec5"
    ),
    "AzureML Data Scientist": "f6c7c914-8db3-469d-8ca1-694a8f32e121",
    "Managed Identity Operator": "f1a07417-d97a-45cb-824c-7a7467783830",
}
# On one online endpoint it allows to delete that endpoint and its deployments, and nothing more.
ENDPOINT_KEEPER = "AzureML Data Scientist"
# On one identity: to read it, and to give it to a resource that one may write. Of the built-in
# roles with userAssignedIdentities/assign/action the one that allows least.
IDENTITY_USER = "Managed Identity Operator"
SECRETS_READER = "Azure Machine Learning Workspace Connection Secrets Reader"
# A role assignment's name must be a GUID. This one is phi3's own; names are derived from it (UUID
# version 5), so that a second run repeats the name instead of getting a 409 for another one.
_ASSIGNMENT_NAMESPACE = uuid.UUID("5b1f6c0e-6f0c-5b7e-9a51-1e0c1a7d3f42")


@dataclass(frozen=True)
class Grant:
    """One role for one identity on one scope (an ARM id)."""

    role: str
    scope: str
    principal_id: str
    # Without a type the SDK sends "User", and Azure then looks up an identity that it may not know
    # yet (PrincipalNotFound). This is right for every managed identity.
    principal_type: str = "ServicePrincipal"

    @property
    def name(self) -> str:
        """The assignment's GUID, derived from scope, role and identity."""
        parts = (self.scope, ROLES[self.role], self.principal_id)
        return str(uuid.uuid5(_ASSIGNMENT_NAMESPACE, "|".join(parts).lower()))

    @property
    def label(self) -> str:
        """`ROLE on RESOURCE`, for people."""
        return f"{self.role} on {last_part(self.scope)}"

    def body(self, subscription_id: str) -> RoleAssignmentCreateParameters:
        """What is sent."""
        from azure.mgmt.authorization.v2022_04_01.models import RoleAssignmentCreateParameters

        definition = "providers/Microsoft.Authorization/roleDefinitions"
        return RoleAssignmentCreateParameters(
            role_definition_id=f"/subscriptions/{subscription_id}/{definition}/{ROLES[self.role]}",
            principal_id=self.principal_id,
            principal_type=self.principal_type,
        )


def grants(
    principal_id: str,
    dependents: Dependents,
    *,
    group: str,
    connections: list[str],
    least_privilege: bool,
) -> list[Grant]:
    """What the identity gets: the tutorials' roles, or only what a deployment and a flow need.

    `group` and `connections` are ARM ids.
    """
    # A user-assigned identity gets nothing by itself, unlike an endpoint's own ("Authentication and
    # authorization for online endpoints").
    wanted: list[tuple[str, str]] = []
    if not least_privilege:
        wanted.append(("Contributor", group))  # as in the tutorials; wider than anything needs
    # The deployment reads the model and pulls its image.
    wanted.append(("Storage Blob Data Reader", dependents.storage_account))
    if dependents.container_registry:
        wanted.append(("AcrPull", dependents.container_registry))
    # Flows in the cloud read the key of a custom connection by `listsecrets`.
    wanted += [(SECRETS_READER, scope) for scope in connections]
    return [Grant(role, scope, principal_id) for role, scope in wanted]


def ensure_grant(clients: Clients, grant: Grant) -> Outcome:
    """Assign the role. StageError with the fix when Azure refuses."""
    from azure.core.exceptions import AzureError

    operations = clients.authorization.role_assignments
    doing = f"Giving the identity the role {grant.role}"
    if get_or_none(lambda: operations.get(grant.scope, grant.name), doing) is not None:
        return "exists"
    body = grant.body(clients.place.subscription_id)
    for tries_left in reversed(range(TRIES)):
        try:
            operations.create(grant.scope, grant.name, body)
        except AzureError as error:
            code = (code_of(error) or "").lower()
            if code == "roleassignmentexists":  # created by someone else under another name
                return "exists"
            # An identity that was created a moment ago is not known everywhere yet.
            if not tries_left or not (is_transient(error) or code == "principalnotfound"):
                raise stage_error(error, doing) from None
        else:
            return "created"
        time.sleep(clients.poll.interval)
    raise AssertionError("unreachable")
