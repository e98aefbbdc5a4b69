"""`down --all`: the workspace and all that `up` made for it, and nothing that it did not make.

What phi3 makes carries the tag created-by; without the tag it is left alone and said to be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ...console import ProgressCallback
from ...recipe_azure import AzureSection
from .clients import Clients
from .dependents import dependents_of
from .failures import explained
from .removing import remove
from .roles import grants
from .waiting import look

TAG, VALUE = "created-by", "phi3-promptflow"
# In the order of deletion: (what, ARM type, api version, the name's field in Workplace).
_RESOURCES = (
    (
        "identity",
        "Microsoft.ManagedIdentity/userAssignedIdentities",
        "2023-01-31",
        "identity",
    ),
    ("container registry", "Microsoft.ContainerRegistry/registries", "2023-07-01",
     "container_registry"),
    ("application insights", "Microsoft.Insights/components", "2020-02-02",
     "application_insights"),
    ("log analytics", "Microsoft.OperationalInsights/workspaces", "2022-10-01", "log_analytics"),
    ("key vault", "Microsoft.KeyVault/vaults", "2023-07-01", "key_vault"),
    ("storage account", "Microsoft.Storage/storageAccounts", "2023-05-01", "storage_account"),
)  # fmt: skip
# Azure keeps these for a while after they are deleted, and their names with them.
_SOFT = {
    "key vault": "kept for up to 90 days, and so is its name; "
    "az keyvault purge --name {name} frees it, az keyvault recover brings it back",
    "log analytics": "kept for 14 days; a new one of that name brings it back",
}


def all_names(clients: Clients) -> list[str]:
    """What `remove_everything` looks at."""
    place = clients.workplace
    return [
        f"project {place.project}",
        f"hub {place.hub}",
        f"workspace {place.workspace_name}",
        *(f"{what} {getattr(place, key)}" for what, _type, _api, key in _RESOURCES),
        f"resource group {place.resource_group}, if nothing else is in it",
    ]


def remove_everything(
    clients: Clients,
    section: AzureSection,
    progress: ProgressCallback,
    gone: list[str],
    kept: list[str],
    soft: list[str],
) -> None:
    """Delete it, one after the other; fills the three lists. StageError at the first refusal."""
    place, limit, pause = clients.workplace, section.poll.delete_timeout, section.poll.interval
    delete = partial(remove, progress=progress, limit=limit, pause=pause)
    workspaces = clients.subscription.workspaces
    _remove_roles(clients, section, gone)
    for what, name in (
        ("project", place.project),
        ("hub", place.hub),
        ("workspace", place.workspace_name),
    ):
        read = partial(workspaces.get, name)
        found = look(read, f"Looking for the {what} {name}")
        if found is not None and _ours(found.tags, f"{what} {name}", kept):
            # For good: what it stands on goes as well, so that it could not be brought back.
            start = partial(
                workspaces.begin_delete,
                name,
                delete_dependent_resources=False,
                permanently_delete=True,
            )
            delete(f"Deleting the {what} {name}", start, read)
            gone.append(f"{what} {name}")
    for what, kind, api, key in _RESOURCES:
        name = getattr(place, key)
        if _remove_resource(clients, what, place.resource_id(kind, name), api, delete, kept):
            gone.append(f"{what} {name}")
            if what in _SOFT:
                soft.append(f"{what} {name}: {_SOFT[what].format(name=name)}")
    _remove_group(clients, delete, gone, kept)


def _ours(tags: Any, what: str, kept: list[str]) -> bool:
    if dict(tags or {}).get(TAG) == VALUE:
        return True
    kept.append(f"{what}: phi3 did not make it")
    return False


def _remove_resource(
    clients: Clients,
    what: str,
    resource_id: str,
    api: str,
    delete: Callable[..., bool],
    kept: list[str],
) -> bool:
    resources = clients.resources.resources
    read = partial(resources.get_by_id, resource_id, api_version=api)
    name = resource_id.rsplit("/", 1)[-1]
    found = look(read, f"Looking for the {what} {name}")
    if found is None or not _ours(found.tags, f"{what} {name}", kept):
        return False
    start = partial(resources.begin_delete_by_id, resource_id, api_version=api)
    return delete(f"Deleting the {what} {name}", start, read)


def _remove_roles(clients: Clients, section: AzureSection, gone: list[str]) -> None:
    """The identity's role assignments; they would outlive it as entries without a name."""
    place = clients.workplace
    identities = clients.identities.user_assigned_identities
    read = partial(identities.get, place.resource_group, place.identity)
    identity = look(read, f"Looking for the identity {place.identity}")
    if identity is None:
        return
    workspaces = clients.subscription.workspaces
    name = place.workspace_name
    workspace = look(lambda: workspaces.get(name), f"Looking for the workspace {name}")
    on_what = dependents_of(workspace, place) if workspace is not None else None
    operations = clients.authorization.role_assignments
    for wanted in grants(
        str(identity.principal_id),
        group=place.group_scope,
        storage=on_what.storage_account
        if on_what
        else place.resource_id("Microsoft.Storage/storageAccounts", place.storage_account),
        registry=on_what.container_registry
        if on_what
        else place.resource_id("Microsoft.ContainerRegistry/registries", place.container_registry),
        connections=[place.workspace_id(), place.workspace_id(place.project)],
        least_privilege=section.least_privilege,
    ):
        on = wanted.scope.rstrip("/").rsplit("/", 1)[-1]
        take = partial(operations.delete, wanted.scope, wanted.name)
        # None also where the scope itself is gone.
        if look(take, f"Taking the role {wanted.role} on {on} from the identity") is not None:
            gone.append(f"role {wanted.role} on {on}")


def _remove_group(
    clients: Clients, delete: Callable[..., bool], gone: list[str], kept: list[str]
) -> None:
    """The group, where phi3 made it and nothing is left in it."""
    name = clients.workplace.resource_group
    groups = clients.resources.resource_groups
    read = partial(groups.get, name)
    found = look(read, f"Looking for the resource group {name}")
    if found is None or not _ours(found.tags, f"resource group {name}", kept):
        return
    with explained(f"Listing what is in the resource group {name}"):
        inside = [
            str(item.name) for item in clients.resources.resources.list_by_resource_group(name)
        ]
    if inside:
        kept.append(
            f"resource group {name}: it still holds {', '.join(inside[:5])}; "
            f"az group delete --name {name} deletes all"
        )
        return
    if delete(f"Deleting the resource group {name}", partial(groups.begin_delete, name), read):
        gone.append(f"resource group {name}")
