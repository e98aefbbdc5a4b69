"""Where a run is on Azure, the name of everything there, and what the run has made.

Reads the recipe's `azure:` section, the environment and the SDK's config.json, in this order; what
none of them gives is a default or is derived from the others, the same way each time. Reads and
writes <run>/place.json and <run>/azure/made.json: names only, never a secret.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pydantic import ValidationError

from ...errors import RecipeError, StageError, UsageError
from ...manifests import PlaceManifest
from ...recipe import read_yaml
from ...recipe.azure import AzureSection
from ...run import RECIPE_FILE, Run, fingerprint, write_atomically

# For each key its environment variables; the first that is set counts. The AZUREML_ARM_* ones are
# set by Azure ML in its own compute, AZURE_LOCATION by the Azure Developer CLI (azd).
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
# The portal and older SDKs write `id` where newer ones write `subscription_id`.
_CONFIG_KEYS = {
    "subscription_id": ("subscription_id", "id"),
    "resource_group": ("resource_group",),
    "workspace_name": ("workspace_name",),
    "location": ("location",),
}
# Tags by which phi3 knows its own resources. Jobs carry the run under a name of their own.
CREATED_BY_TAG, CREATED_BY = "created-by", "phi3-promptflow"
RUN_TAG, JOB_RUN_TAG = "phi3_run", "phi3-run"
ROLLOUT_TAG = "phi3_rollout"  # of an endpoint between two states
# Keys of azure.endpoint that say what is kept for how long, and change no deployment.
WITHOUT_REDEPLOYMENT = (
    "keep_deployments",
    "deadline",
    "remove_failed_after",
    "remove_unused_after",
)
# The longest name of an endpoint or a deployment ("Endpoint limits" in Azure ML's "Manage and
# increase quotas").
LONGEST_NAME = 32


@dataclass(frozen=True)
class Place:
    """Every name on Azure that phi3 uses; `sources` says where the first five came from."""

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
        # Workspace, hub and Foundry project are one resource type that differs in `kind`.
        kind = "Microsoft.MachineLearningServices/workspaces"
        return self.resource_id(kind, name or self.workspace_name)

    def lines(self) -> list[str]:
        """What was chosen, and where each value came from."""
        return [f"azure.{key} {getattr(self, key)}: {why}" for key, why in self.sources.items()]


AZURE = "azure"  # the target's name
_RECORDED_FIELDS = tuple(item.name for item in fields(Place) if item.name != "sources")


def find_place(section: AzureSection, environment: Mapping[str, str], folder: Path) -> Place:
    """Fill in what the recipe leaves out; RecipeError with every fault at once."""
    config, config_path = _read_config(folder)
    values: dict[str, str] = {}
    sources: dict[str, str] = {}
    for key, variables in VARIABLES.items():
        in_recipe = getattr(section, key)
        variable = next((name for name in variables if environment.get(name, "").strip()), None)
        in_config = next((config[k] for k in _CONFIG_KEYS.get(key, ()) if config.get(k)), None)
        if in_recipe is not None:
            values[key], sources[key] = str(in_recipe), "the recipe"
        elif variable is not None:
            values[key], sources[key] = environment[variable].strip(), f"${variable}"
        elif in_config is not None:
            values[key], sources[key] = str(in_config), str(config_path)
        elif key in DEFAULTS:
            values[key], sources[key] = DEFAULTS[key], "default"

    # All faults at once, not one by one.
    faults: list[str] = []
    if "subscription_id" not in values:
        faults.append(
            "subscription_id: missing; set azure.subscription_id=GUID, or set "
            "AZURE_SUBSCRIPTION_ID, or put the workspace's config.json here "
            "(list your subscriptions: az account list --output table)"
        )
    checked = AzureSection()
    try:  # again as a section: values from outside the recipe follow Azure's rules, too
        checked = AzureSection.model_validate(values)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else "azure"
            message = item["msg"].removeprefix("Value error, ")
            faults.append(f"{key} {values.get(key)!r} (from {sources.get(key, '?')}): {message}")
    if faults:
        raise RecipeError("The Azure location", faults)

    known = {key: getattr(checked, key) for key in VARIABLES}
    workspace = known["workspace_name"]
    # Storage account, key vault and registry have names that are unique in the whole world, hence
    # the hash. It is derived, not drawn: a second run finds what the first one made.
    identity = "/".join((known["subscription_id"], known["resource_group"], workspace)).lower()
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    names = {
        "storage_account": f"phi3st{digest}",
        "key_vault": f"phi3-kv-{digest}",
        "application_insights": f"{workspace}-insights",
        "log_analytics": f"{workspace.replace('_', '-')}-logs".strip("-"),
        "container_registry": f"phi3cr{digest}",
        "identity": f"{workspace}-identity",
        # A hub's or project's name has at most 33 characters.
        "hub": f"{workspace[:29]}-hub",
        "project": f"{workspace[:25]}-project",
    }
    chosen = {key: getattr(section, key) or name for key, name in names.items()}
    return Place(**known, **chosen, sources=sources)


def _read_config(folder: Path) -> tuple[Mapping[str, object], Path | None]:
    """The SDK's config.json, where MLClient.from_config would find it; empty if there is none."""
    folder = folder.resolve()
    for inner in (".azureml", "aml_config", "."):
        for parent in (folder, *folder.parents):
            path = parent / inner / "config.json"
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if not isinstance(content, dict):
                continue
            scope = content.get("Scope")  # azureml-core, the SDK before azure-ai-ml, wrote an id
            if isinstance(scope, str) and scope.count("/") >= 8:
                parts = scope.strip("/").split("/")
                ids = dict(zip(parts[::2], parts[1::2], strict=False))
                return {
                    "subscription_id": ids.get("subscriptions"),
                    "resource_group": ids.get("resourceGroups"),
                    "workspace_name": ids.get("workspaces"),
                }, path
            # A model's folder has a config.json as well.
            if {"subscription_id", "workspace_name"} <= content.keys():
                return content, path
    return {}, None


def settle(section: AzureSection, run: Run) -> Place:
    """The place of a run that is about to be worked on; recorded in the run folder.

    A run stays where it began: UsageError when recipe, environment or config.json now name another
    place, because phi3 would lose track of what the run made at the first one.
    """
    recorded = run.read(PlaceManifest)
    if recorded is None:
        place = find_place(section, os.environ, Path.cwd())
    else:
        try:
            named = find_place(section, os.environ, Path.cwd())
        except UsageError:
            if section.subscription_id is not None:
                raise
            # Nothing names a subscription now; the run knows its own.
            update = {"subscription_id": recorded.subscription_id}
            named = find_place(section.model_copy(update=update), os.environ, Path.cwd())
        moved = [
            f"{key} {getattr(named, key)} ({named.sources[key]}) "
            f"instead of {getattr(recorded, key)}"
            for key in ("subscription_id", "resource_group", "workspace_name")
            if named.sources.get(key) != "default"
            and str(getattr(named, key)).lower() != str(getattr(recorded, key)).lower()
        ]
        if moved:
            raise UsageError(
                f"The run {run.name!r} lives elsewhere on Azure; you now name {'; '.join(moved)}. "
                f"Use another run for that: --run NAME"
            )
        place = find_place(_with_recorded(section, recorded), os.environ, Path.cwd())
    content = {name: getattr(place, name) for name in _RECORDED_FIELDS}
    settled = PlaceManifest(target=AZURE, **content)
    if settled != recorded:
        run.write(settled)
    return place


def place_of(run: Run) -> Place:
    """The place that the run folder names. StageError where it names none."""
    recorded = run.require(PlaceManifest)
    return find_place(_with_recorded(AzureSection(), recorded), {}, run.path)


def _with_recorded(section: AzureSection, recorded: PlaceManifest) -> AzureSection:
    values = {key: getattr(recorded, key) for key in _RECORDED_FIELDS}
    update = {key: value for key, value in values.items() if value is not None}
    return section.model_copy(update=update)


def section_of(run: Run) -> AzureSection:
    """The `azure:` section of the recipe that the run was made with."""
    path = run.path / RECIPE_FILE
    content = read_yaml(path).get("azure") if path.is_file() else None
    try:
        return AzureSection.model_validate(content or {})
    except ValidationError:
        raise StageError(
            f"{path} has an azure: section that this version cannot read; name the recipe again: "
            f"phi3 up RECIPE --on azure"
        ) from None


def endpoint_name(section: AzureSection, place: Place, run: Run) -> str:
    """The recipe's, else the run's name with a hash of subscription, workspace and run."""
    if section.endpoint.name is not None:
        return section.endpoint.name
    # An endpoint's name is its host name, unique in the region across all customers.
    mark = fingerprint([place.workspace_id().lower(), run.name])[:8]
    words = _lower_words(run.name)
    name = words if words[:1].isalpha() else f"m-{words}".rstrip("-")  # a letter comes first
    return f"{name[: LONGEST_NAME - len(mark) - 1].rstrip('-')}-{mark}"


def deployment_name(section: AzureSection, model: str, version: str) -> str:
    """A name that changes with the model's version and with how it is served.

    A name in the recipe is its prefix.
    """
    settings = section.endpoint
    # A changed model or setting is a new deployment next to the old one, never an update of the one
    # that has the traffic.
    ignored = {"name", "auth_mode", *WITHOUT_REDEPLOYMENT}
    shape = settings.model_dump(mode="json", exclude=ignored)
    # Six hex digits: deployments are compared within one endpoint, which has at most 20.
    mark = fingerprint([shape, f"{model}:{version}"])[:6]
    name = f"v{_lower_words(version)}"
    if settings.deployment is not None:
        name = f"{settings.deployment}-{name}"
    return f"{name[: LONGEST_NAME - len(mark) - 1].rstrip('-')}-{mark}"


def _lower_words(text: str) -> str:
    """Lower-case letters and digits, with single dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def resource_tags(section: AzureSection) -> dict[str, str]:
    """The tags of everything that phi3 provisions."""
    return {CREATED_BY_TAG: CREATED_BY, **section.tags}


def made_by_phi3(tags: Mapping[str, str] | None) -> bool:
    """Whether a resource carries phi3's tag; without it `down` leaves the resource alone."""
    return (tags or {}).get(CREATED_BY_TAG) == CREATED_BY


@dataclass(frozen=True)
class RunResource:
    """One thing that a run made, or was about to make."""

    kind: str  # endpoint, deployment, model, connection, flow
    name: str
    parent: str = ""  # the endpoint of a deployment, the workspace of a connection


def record(run: Run, resource: RunResource) -> None:
    """Write the resource down; call this before the call that makes it."""
    # A process killed in between leaves a name too many, never a GPU that nobody knows of.
    known = recorded_resources(run)
    if resource not in known:
        _write_resources(run, [*known, resource])


def forget(run: Run, deleted: RunResource) -> None:
    """Take a deleted resource off the list, and with an endpoint all its deployments."""
    is_endpoint = deleted.kind == "endpoint"
    remaining = [
        item
        for item in recorded_resources(run)
        if item != deleted and not (is_endpoint and item.parent == deleted.name)
    ]
    _write_resources(run, remaining)


def recorded_resources(run: Run, kind: str | None = None) -> list[RunResource]:
    """What the run made, in order. StageError where the list cannot be read."""
    path = run.path / "azure" / "made.json"
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["made"]
        resources = [RunResource(**item) for item in items]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError):
        raise StageError(
            f"{path} is not a list that phi3 wrote. Look in Azure ML Studio for what the run "
            f"created, then delete the file"
        ) from None
    return [item for item in resources if kind in (None, item.kind)]


def _write_resources(run: Run, resources: list[RunResource]) -> None:
    text = json.dumps({"made": [asdict(item) for item in resources]}, indent=2)
    write_atomically(run.file("azure", "made.json"), text + "\n")
