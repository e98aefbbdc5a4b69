"""Where on Azure: subscription, resource group, workspace and the names of what stands in them.

Reads the recipe's `azure:` section, the environment and the SDK's config.json, in this order; what
none of them gives is a default or a name made from the others, the same each time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...errors import RecipeError
from ...recipe_azure import AzureSection

# key: environment variables, the first that is set counts. The AZUREML_ARM_* are those that
# Azure ML sets in its own compute; AZURE_LOCATION is the Azure Developer CLI's.
VARIABLES = {
    "subscription_id": ("AZURE_SUBSCRIPTION_ID", "AZUREML_ARM_SUBSCRIPTION"),
    "tenant_id": ("AZURE_TENANT_ID",),
    "resource_group": (
        "AZURE_RESOURCE_GROUP",
        "AZURE_RESOURCE_GROUP_NAME",
        "AZUREML_ARM_RESOURCEGROUP",
    ),
    "workspace_name": (
        "AZURE_ML_WORKSPACE",
        "AZUREML_WORKSPACE_NAME",
        "AZUREML_ARM_WORKSPACE_NAME",
    ),
    "location": ("AZURE_LOCATION", "AZURE_REGION"),
}
DEFAULTS = {
    "resource_group": "phi3-promptflow",
    "workspace_name": "phi3-workspace",
    "location": "eastus",
}
_NO_SUBSCRIPTION = (
    "subscription_id: is missing; give azure.subscription_id=GUID, or AZURE_SUBSCRIPTION_ID in the "
    "environment, or the workspace's config.json (yours: az account list --output table)"
)
_CONFIG_KEYS = {
    "subscription_id": ("subscription_id", "id"),
    "resource_group": ("resource_group",),
    "workspace_name": ("workspace_name",),
    "location": ("location",),
}


@dataclass(frozen=True)
class Workplace:
    """Every name that the Azure half uses; `sources` says where each of the first came from."""

    subscription_id: str
    tenant_id: str | None
    resource_group: str
    workspace_name: str
    location: str
    storage_account: str
    key_vault: str
    application_insights: str
    log_analytics: str
    container_registry: str
    identity: str
    hub: str
    project: str
    sources: Mapping[str, str]

    @property
    def subscription_scope(self) -> str:
        """The ARM id of the subscription."""
        return f"/subscriptions/{self.subscription_id}"

    @property
    def group_scope(self) -> str:
        """The ARM id of the resource group."""
        return f"{self.subscription_scope}/resourceGroups/{self.resource_group}"

    def resource_id(self, provider_type: str, name: str) -> str:
        """The ARM id of `name` in the group, e.g. of type `Microsoft.KeyVault/vaults`."""
        return f"{self.group_scope}/providers/{provider_type}/{name}"

    def workspace_id(self, name: str | None = None) -> str:
        """The ARM id of the workspace, or of the hub or project called `name`."""
        kind = "Microsoft.MachineLearningServices/workspaces"
        return self.resource_id(kind, name or self.workspace_name)

    def lines(self) -> list[str]:
        """What was chosen and from where."""
        return [f"azure.{key} {getattr(self, key)}: {why}" for key, why in self.sources.items()]


def find_workplace(
    section: AzureSection, environment: Mapping[str, str], folder: Path
) -> Workplace:
    """Fill in what the recipe leaves out; RecipeError with every fault at once."""
    config, config_path = _read_config(folder)
    values: dict[str, str | None] = {}
    sources: dict[str, str] = {}
    for key in VARIABLES:
        values[key], source = _find(key, section, environment, (config, config_path))
        if values[key] is not None:
            sources[key] = source
    _check({key: value for key, value in values.items() if value is not None}, sources)
    known = _normalised(values)
    return Workplace(**known, **_names(section, known), sources=sources)


def _find(
    key: str,
    section: AzureSection,
    environment: Mapping[str, str],
    config: tuple[Mapping[str, Any], Path | None],
) -> tuple[str | None, str]:
    given = getattr(section, key)
    if given is not None:
        return str(given), "the recipe"
    for variable in VARIABLES[key]:
        if environment.get(variable, "").strip():
            return environment[variable].strip(), f"${variable}"
    content, path = config
    for name in _CONFIG_KEYS.get(key, ()):
        if content.get(name):
            return str(content[name]), str(path)
    return DEFAULTS.get(key), "default"


def _normalised(values: Mapping[str, str | None]) -> dict[str, Any]:
    checked = AzureSection.model_validate({k: v for k, v in values.items() if v is not None})
    return {key: getattr(checked, key) for key in VARIABLES}


def _check(values: Mapping[str, str], sources: Mapping[str, str]) -> None:
    faults = [] if "subscription_id" in values else [_NO_SUBSCRIPTION]
    try:
        AzureSection.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else "azure"
            message = item["msg"].removeprefix("Value error, ")
            faults.append(f"{key} {values.get(key)!r} (from {sources.get(key, '?')}): {message}")
    if faults:
        raise RecipeError("The place on Azure", faults)


def _names(section: AzureSection, known: Mapping[str, Any]) -> dict[str, str]:
    """The names of what a workspace needs; those unique in the world carry a hash of its id."""
    workspace = known["workspace_name"]
    digest = _digest(known["subscription_id"], known["resource_group"], workspace)
    defaults = {
        "storage_account": f"phi3st{digest}",
        "key_vault": f"phi3-kv-{digest}",
        "application_insights": f"{workspace}-insights",
        "log_analytics": f"{workspace.replace('_', '-')}-logs".strip("-"),
        "container_registry": f"phi3cr{digest}",
        "identity": f"{workspace}-identity",
        "hub": f"{workspace[:29]}-hub",
        "project": f"{workspace[:25]}-project",
    }
    return {key: getattr(section, key) or name for key, name in defaults.items()}


def _digest(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).lower().encode()).hexdigest()[:12]


def _read_config(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """The SDK's config.json, found where MLClient.from_config finds it."""
    folder = folder.resolve()
    for inner in (".azureml", "aml_config", "."):
        for place in (folder, *folder.parents):
            path = place / inner / "config.json"
            content = _azure_config(path)
            if content is not None:
                return content, path
    return {}, None


def _azure_config(path: Path) -> dict[str, Any] | None:
    """The content, if it is a workspace's config.json: models have a file of that name, too."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    scope = content.get("Scope")
    if isinstance(scope, str) and scope.count("/") >= 8:
        parts = scope.strip("/").split("/")
        found = dict(zip(parts[::2], parts[1::2], strict=False))
        return {
            "subscription_id": found.get("subscriptions"),
            "resource_group": found.get("resourceGroups"),
            "workspace_name": found.get("workspaces"),
        }
    return content if {"subscription_id", "workspace_name"} <= content.keys() else None
