"""What a workspace is made on: storage account, key vault, log analytics, insights and registry.

Each is made by PUT on its own id, under a name that follows from the workspace's id.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ...console import ProgressCallback
from ...errors import StageError
from .clients import Clients
from .failures import code_of, explained
from .waiting import look, make
from .workplace import Workplace

StepRunner = Callable[[str, str, Callable[[], str]], bool]
_SUBSCRIPTION_API = "2022-12-01"


@dataclass(frozen=True)
class Dependents:
    """The ARM ids."""

    storage_account: str
    key_vault: str
    application_insights: str | None
    container_registry: str | None

    def as_arguments(self) -> dict[str, str]:
        """As the SDK's Workspace and Hub take them."""
        return {key: value for key, value in asdict(self).items() if value}

    def named(self) -> list[tuple[str, str]]:
        """(what, name) of each."""
        return [
            (key.replace("_", " "), value.rstrip("/").rsplit("/", 1)[-1])
            for key, value in self.as_arguments().items()
        ]


@dataclass(frozen=True)
class _Kind:
    what: str
    provider_type: str
    api_version: str
    name: str
    body: Callable[[], dict[str, Any]]


def dependents_of(workspace: Any, place: Workplace) -> Dependents:
    """What an existing workspace stands on."""
    return Dependents(
        storage_account=workspace.storage_account
        or place.resource_id("Microsoft.Storage/storageAccounts", place.storage_account),
        key_vault=workspace.key_vault
        or place.resource_id("Microsoft.KeyVault/vaults", place.key_vault),
        application_insights=workspace.application_insights,
        container_registry=workspace.container_registry,
    )


def ensure_dependents(
    clients: Clients, tags: dict[str, str], progress: ProgressCallback, step: StepRunner
) -> Dependents | None:
    """Make what is missing; None when a step failed."""
    place = clients.workplace
    ids: dict[str, str] = {}
    good = True
    for kind in _kinds(clients):
        resource_id = place.resource_id(kind.provider_type, kind.name)
        ids[kind.what] = resource_id
        good &= step(
            kind.what,
            kind.name,
            partial(_ensure, clients, kind, resource_id, tags, progress),
        )
    if not good:
        return None
    return Dependents(
        storage_account=ids["storage account"],
        key_vault=ids["key vault"],
        application_insights=ids["application insights"],
        container_registry=ids["container registry"],
    )


def _kinds(clients: Clients) -> list[_Kind]:
    place = clients.workplace
    logs = place.resource_id("Microsoft.OperationalInsights/workspaces", place.log_analytics)
    return [
        _Kind(
            "storage account",
            "Microsoft.Storage/storageAccounts",
            "2023-05-01",
            place.storage_account,
            _storage,
        ),
        _Kind(
            "key vault",
            "Microsoft.KeyVault/vaults",
            "2023-07-01",
            place.key_vault,
            lambda: _vault(_tenant(clients)),
        ),
        _Kind(
            "log analytics",
            "Microsoft.OperationalInsights/workspaces",
            "2022-10-01",
            place.log_analytics,
            lambda: {"properties": {"sku": {"name": "PerGB2018"}, "retentionInDays": 30}},
        ),
        _Kind(
            "application insights",
            "Microsoft.Insights/components",
            "2020-02-02",
            place.application_insights,
            lambda: {
                "kind": "web",
                "properties": {"Application_Type": "web", "WorkspaceResourceId": logs},
            },
        ),
        _Kind(
            "container registry",
            "Microsoft.ContainerRegistry/registries",
            "2023-07-01",
            place.container_registry,
            # A workspace that signs in with its own identity needs the registry's admin user.
            lambda: {"sku": {"name": "Basic"}, "properties": {"adminUserEnabled": True}},
        ),
    ]


def _storage() -> dict[str, Any]:
    return {
        "kind": "StorageV2",
        "sku": {"name": "Standard_LRS"},
        "properties": {
            "allowBlobPublicAccess": False,
            "minimumTlsVersion": "TLS1_2",
            "supportsHttpsTrafficOnly": True,
        },
    }


def _vault(tenant: str) -> dict[str, Any]:
    return {
        "properties": {
            "tenantId": tenant,
            "sku": {"family": "A", "name": "standard"},
            "accessPolicies": [],
            "enableRbacAuthorization": True,
        }
    }


def _ensure(
    clients: Clients,
    kind: _Kind,
    resource_id: str,
    tags: dict[str, str],
    progress: ProgressCallback,
) -> str:
    from azure.core.exceptions import HttpResponseError

    resources = clients.resources.resources
    doing = f"Making the {kind.what} {kind.name}"

    def read() -> Any:
        return resources.get_by_id(resource_id, api_version=kind.api_version)

    def put(body: Any) -> Any:
        return resources.begin_create_or_update_by_id(
            resource_id, body, api_version=kind.api_version
        )

    def start() -> Any:
        body: Any = {"location": clients.workplace.location, "tags": tags, **kind.body()}
        try:
            return put(body)
        except HttpResponseError as error:
            if (code_of(error) or "").lower() == "missingsubscriptionregistration":
                _register(clients, kind.provider_type.split("/")[0], progress)
            elif error.status_code == 409 and "deleted state" in str(error).lower():
                # A deleted key vault keeps its name for days; ours is taken back.
                body["properties"] = {**body["properties"], "createMode": "recover"}
            else:
                raise
        return put(body)

    if look(read, doing) is not None:
        return "exists"
    poll = clients.poll
    make(doing, start, read, progress, limit=poll.provision_timeout, pause=poll.interval)
    return "created"


def _register(clients: Clients, namespace: str, progress: ProgressCallback) -> None:
    """A subscription must register a provider once; that takes a minute or two."""
    providers = clients.resources.providers
    with explained(f"Registering the provider {namespace}"):
        found = providers.register(namespace)
        ends = time.monotonic() + clients.poll.provision_timeout
        while str(found.registration_state).lower() != "registered":
            if time.monotonic() > ends:
                raise StageError(
                    f"The provider {namespace} is not registered yet; type the same command again"
                )
            progress(0, 0, f"registering {namespace}")
            time.sleep(clients.poll.interval)
            found = providers.get(namespace)


def _tenant(clients: Clients) -> str:
    """The tenant of the subscription: a key vault belongs to one."""
    place = clients.workplace
    if place.tenant_id is not None:
        return place.tenant_id
    with explained("Looking up the subscription's tenant"):
        found: Any = clients.resources.resources.get_by_id(
            place.subscription_scope, api_version=_SUBSCRIPTION_API
        )
    tenant = found.get("tenantId")
    if not tenant:
        raise StageError("The subscription's tenant is not known: set azure.tenant_id=GUID")
    return str(tenant)
