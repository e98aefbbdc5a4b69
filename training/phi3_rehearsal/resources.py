"""Subscriptions, resource groups, template deployments, and what a workspace stands on.

Of templates the one with which azure-ai-ml makes a workspace is carried out; others are refused.
"""

from __future__ import annotations

import re
import shutil
from typing import Any

from . import workspaces
from .cloud import POLL, TENANT, Cloud, check_location, listed, need_group, public, route, stamps
from .offers import REGIONS
from .wire import ARM, GROUP, AzureError, Json, Reply, Request, bad, not_found

_GROUP_NAME = re.compile(r"[-\w.()]{0,89}[-\w()]")


@route("GET", ARM, "/subscriptions")
def list_subscriptions(_cloud: Cloud, _request: Request) -> Reply:
    """The one subscription that the environment names by default."""
    return Reply(200, {"value": [_subscription("5ab5c817-0000-4000-8000-5ab5c8170000")]})


@route("GET", ARM, "/subscriptions/{sub}")
def get_subscription(_cloud: Cloud, request: Request) -> Reply:
    """Any subscription exists."""
    return Reply(200, _subscription(request.args["sub"]))


@route("GET", ARM, "/subscriptions/{sub}/locations")
def list_locations(_cloud: Cloud, _request: Request) -> Reply:
    """The regions."""
    return Reply(200, {"value": [{"name": name, "displayName": name} for name in REGIONS]})


@route("GET", ARM, "/subscriptions/{sub}/providers/{namespace}")
def get_provider(_cloud: Cloud, request: Request) -> Reply:
    """Every resource provider is registered."""
    name = request.args["namespace"]
    return Reply(
        200,
        {
            "id": request.id("/subscriptions/{sub}/providers/{namespace}"),
            "namespace": name,
            "registrationState": "Registered",
            "resourceTypes": [],
        },
    )


@route("POST", ARM, "/subscriptions/{sub}/providers/{namespace}/register")
def register_provider(cloud: Cloud, request: Request) -> Reply:
    """Nothing to do."""
    return get_provider(cloud, request)


@route("GET", ARM, "/subscriptions/{sub}/resourceGroups")
def list_groups(cloud: Cloud, request: Request) -> Reply:
    """All resource groups."""
    prefix = request.id("/subscriptions/{sub}/resourceGroups")
    return listed(cloud.children(prefix, "Microsoft.Resources/resourceGroups"))


@route("PUT", ARM, GROUP)
def put_group(cloud: Cloud, request: Request) -> Reply:
    """Make or update a resource group."""
    name, body = request.args["rg"], request.json()
    location = check_location(body.get("location"))
    if not _GROUP_NAME.fullmatch(name):
        raise bad(f"The resource group name '{name}' is invalid.", "InvalidResourceGroupName")
    before = cloud.get(request.id(GROUP))
    if before and before["location"] != location:
        raise AzureError(
            409,
            "InvalidResourceGroupLocation",
            f"Invalid resource group location '{location}'. The resource group already exists "
            f"in location '{before['location']}'.",
        )
    document = {
        "location": location,
        "tags": body.get("tags") or {},
        "properties": {"provisioningState": "Succeeded"},
    }
    made = cloud.put(request.id(GROUP), "Microsoft.Resources/resourceGroups", document)
    return Reply(200 if before else 201, public(made))


@route("GET", ARM, GROUP)
def get_group(cloud: Cloud, request: Request) -> Reply:
    """One resource group."""
    return Reply(200, public(need_group(cloud, request)))


@route("HEAD", ARM, GROUP)
def check_group(cloud: Cloud, request: Request) -> Reply:
    """Whether it exists."""
    return Reply(204 if cloud.get(request.id(GROUP)) else 404)


@route("DELETE", ARM, GROUP)
def delete_group(cloud: Cloud, request: Request) -> Reply:
    """Delete the group with everything in it, unless a deployment or job still runs there."""
    group = need_group(cloud, request)
    cloud.release(group["id"])
    for doc in cloud.children(group["id"]):
        before_delete(cloud, doc)
    operation = cloud.operate(group, kind="delete")
    return cloud.accepted(group, operation, 202, body=False)


@route("GET", ARM, GROUP + "/resources")
def list_resources(cloud: Cloud, request: Request) -> Reply:
    """The top-level resources of a group; deployments and role assignments are not among them."""
    prefix = need_group(cloud, request)["id"] + "/providers"
    depth = len(prefix.split("/")) + 3
    found = [d for d in cloud.children(prefix) if len(d["id"].split("/")) == depth]
    hidden = ("Microsoft.Resources/", "Microsoft.Authorization/")
    return listed([doc for doc in found if not doc["type"].startswith(hidden)])


@route("GET", ARM, "/subscriptions/{sub}/providers/{ns}/locations/{loc}/operationsStatus/{op}")
def operation_status(cloud: Cloud, request: Request) -> Reply:
    """How far a long-running operation has come."""
    operation = cloud.operations.get(request.args["op"])
    if operation is None:
        raise not_found("operation", request.args["op"])
    body: Json = {
        "id": request.path,
        "name": request.args["op"],
        "status": operation.status,
        "percentComplete": 50.0 if operation.status == "InProgress" else 100.0,
    }
    if operation.error:
        body["error"] = operation.error
    return Reply(200, body, POLL if operation.status == "InProgress" else {})


@route("GET", ARM, "/subscriptions/{sub}/providers/{ns}/locations/{loc}/operationResults/{op}")
def operation_result(cloud: Cloud, request: Request) -> Reply:
    """What a finished operation made."""
    operation = cloud.operations.get(request.args["op"])
    if operation is None:
        raise not_found("operation", request.args["op"])
    if operation.status == "InProgress":
        return Reply(202, None, {"Location": f"https://{ARM}{request.target}", **POLL})
    if operation.error:
        return Reply(400, {"error": operation.error})
    found = cloud.get(operation.resource)
    return Reply(200, public(found)) if found else Reply(204)


_DEPLOYMENT = GROUP + "/providers/Microsoft.Resources/deployments/{deployment}"


@route("PUT", ARM, _DEPLOYMENT)
def put_deployment(cloud: Cloud, request: Request) -> Reply:
    """Carry out a template deployment."""
    need_group(cloud, request)
    properties = request.json().get("properties") or {}
    values = {name: p.get("value") for name, p in (properties.get("parameters") or {}).items()}
    kinds = {r.get("type") for r in (properties.get("template") or {}).get("resources", [])}
    if "workspaceName" not in values or workspaces.KIND not in kinds:
        raise AzureError(501, "NotRehearsed", "Only the workspace template of the SDK is rehearsed")
    made = _from_template(cloud, request, values)
    document = {
        "properties": {
            "provisioningState": "Accepted",
            "mode": "Incremental",
            "duration": "PT2S",
            "timestamp": stamps()["createdAt"],
            "outputResources": [{"id": arm_id} for arm_id in made],
        }
    }
    kind = "Microsoft.Resources/deployments"
    deployment = cloud.put(request.id(_DEPLOYMENT), kind, document)
    return cloud.accepted(deployment, cloud.operate(deployment), 201)


@route("GET", ARM, _DEPLOYMENT)
def get_deployment(cloud: Cloud, request: Request) -> Reply:
    """One template deployment."""
    return Reply(200, public(cloud.need(request.id(_DEPLOYMENT), "deployment")))


@route("GET", ARM, GROUP + "/deployments/{deployment}/operations")
def list_deployment_operations(cloud: Cloud, request: Request) -> Reply:
    """What the deployment made, one operation each."""
    deployment = cloud.need(request.id(_DEPLOYMENT), "deployment")
    made = [cloud.get(item["id"]) for item in deployment["properties"]["outputResources"]]
    return Reply(200, {"value": [_operation_of(doc, deployment) for doc in made if doc]})


def _operation_of(doc: Json, deployment: Json) -> Json:
    target = {"id": doc["id"], "resourceType": doc["type"], "resourceName": doc["name"]}
    properties = {
        "provisioningOperation": "Create",
        "provisioningState": deployment["properties"]["provisioningState"],
        "statusCode": "OK",
        "serviceRequestId": "rehearsal",
        "targetResource": target,
    }
    return {"id": doc["id"], "operationId": doc["name"], "properties": properties}


def _from_template(cloud: Cloud, request: Request, values: Json) -> list[str]:
    """The workspace and what it stands on, from the template's parameters."""
    location = check_location(values.get("location"))
    made, ids = [], {}
    for option, name, kind in (
        ("storageAccount", "storageAccountName", "Microsoft.Storage/storageAccounts"),
        ("keyVault", "keyVaultName", "Microsoft.KeyVault/vaults"),
        ("applicationInsights", "applicationInsightsName", "Microsoft.Insights/components"),
        ("containerRegistry", "containerRegistryName", "Microsoft.ContainerRegistry/registries"),
    ):
        default = "none" if option == "containerRegistry" else "new"
        state = values.get(f"{option}Option") or default
        if state == "none" or values.get("kind", "").lower() == "project":
            continue
        group = values.get(f"{option}ResourceGroupName") or request.args["rg"]
        arm_id = request.id(GROUP, rg=group) + f"/providers/{kind}/{values[name]}"
        ids[option] = arm_id
        if state == "new":
            put_plain(cloud, arm_id, kind, {"location": location})
            made.append(arm_id)
        else:
            cloud.need(arm_id, kind)
    body = {
        "location": location,
        "kind": values.get("kind") or "default",
        "identity": values.get("identity"),
        "tags": values.get("tagValues") or {},
        "properties": {
            "friendlyName": values.get("friendlyName"),
            "description": values.get("description"),
            "hubResourceId": values.get("workspace_hub") or None,
            "primaryUserAssignedIdentity": values.get("primaryUserAssignedIdentity") or None,
            **ids,
        },
    }
    arm_id = request.id(GROUP) + f"/providers/{workspaces.KIND}/{values['workspaceName']}"
    workspaces.make(cloud, arm_id, body)
    return [*made, arm_id]


def _subscription(name: str) -> Json:
    return {
        "id": f"/subscriptions/{name}",
        "subscriptionId": name,
        "displayName": "Rehearsal",
        "tenantId": TENANT,
        "state": "Enabled",
    }


# --- what a workspace stands on: storage, key vault, logs, insights, registry ---

# What a workspace stands on. The pattern is Azure's rule for the name.
PLAIN = {
    "Microsoft.Storage/storageAccounts": r"[a-z0-9]{3,24}",
    "Microsoft.KeyVault/vaults": r"[A-Za-z](?!.*--)[A-Za-z0-9-]{1,22}[A-Za-z0-9]",
    "Microsoft.Insights/components": r"[^%&\\?/]{1,260}",
    "Microsoft.OperationalInsights/workspaces": r"[A-Za-z0-9][A-Za-z0-9-]{2,61}[A-Za-z0-9]",
    "Microsoft.ContainerRegistry/registries": r"[A-Za-z0-9]{5,50}",
}
_STORAGE, _VAULT = "Microsoft.Storage/storageAccounts", "Microsoft.KeyVault/vaults"
_ANY = "|".join(PLAIN)
_PLAIN_ID = GROUP + f"/providers/{{kind:{_ANY}}}/{{name}}"


def _plain_kind(request: Request) -> str:
    wanted = request.args["kind"].lower()
    return next(kind for kind in PLAIN if kind.lower() == wanted)


def put_plain(cloud: Cloud, arm_id: str, kind: str, body: Json) -> Json:
    """Store a storage account, key vault, registry … after a look at its name."""
    name = arm_id.rsplit("/", 1)[-1]
    if not re.fullmatch(PLAIN[kind], name):
        raise bad(f"'{name}' is not a valid name for {kind}.", "AccountNameInvalid")
    _check_deleted(cloud, arm_id, kind, body)
    document: Json = {k: body[k] for k in ("location", "sku", "kind", "tags") if k in body}
    given: dict[str, Any] = body.get("properties") or {}
    document["properties"] = {**given, "provisioningState": "Succeeded"}
    if kind.startswith("Microsoft.Storage"):
        document["properties"]["primaryEndpoints"] = {
            "blob": f"https://{name}.blob.core.windows.net/"
        }
    if kind.startswith("Microsoft.ContainerRegistry"):
        document["properties"]["loginServer"] = f"{name}.azurecr.io"
    if kind.startswith("Microsoft.KeyVault"):
        document["properties"]["vaultUri"] = f"https://{name}.vault.azure.net/"
    return cloud.put(arm_id, kind, document)


@route("PUT", ARM, _PLAIN_ID)
def put_resource(cloud: Cloud, request: Request) -> Reply:
    """Make one of the things that a workspace stands on."""
    kind = _plain_kind(request)
    need_group(cloud, request)
    body = request.json()
    check_location(body.get("location"))
    before = cloud.get(request.id(_PLAIN_ID))
    made = put_plain(cloud, request.id(_PLAIN_ID), kind, body)
    return Reply(200 if before else 201, public(made))


@route("GET", ARM, _PLAIN_ID)
def get_resource(cloud: Cloud, request: Request) -> Reply:
    """One of them."""
    return Reply(200, public(cloud.need(request.id(_PLAIN_ID), request.args["kind"])))


@route("HEAD", ARM, _PLAIN_ID)
def check_resource(cloud: Cloud, request: Request) -> Reply:
    """Whether it exists."""
    return Reply(204 if cloud.get(request.id(_PLAIN_ID)) else 404)


@route("DELETE", ARM, _PLAIN_ID)
def delete_resource(cloud: Cloud, request: Request) -> Reply:
    """Delete one of them."""
    found = cloud.get(request.id(_PLAIN_ID))
    if found is None:
        return Reply(204)
    before_delete(cloud, found)
    cloud.delete(found["id"])
    return Reply(200)


def before_delete(cloud: Cloud, doc: Json) -> None:
    """A storage account takes its files along; a key vault leaves its name behind."""
    if doc["type"] == _STORAGE:
        for kind in ("blobs", "blobmeta", "shares"):
            shutil.rmtree(cloud.folder / kind / doc["name"], ignore_errors=True)
    if doc["type"] == _VAULT:
        _keep_deleted(cloud, doc)


# --- key vaults stay reserved for 90 days after they are deleted ---

_DELETED_KIND = "Microsoft.KeyVault/deletedVaults"
_SUBSCRIPTION = "/subscriptions/{sub}/providers/Microsoft.KeyVault"
_DELETED = _SUBSCRIPTION + "/locations/{loc}/deletedVaults/{name}"


def _keep_deleted(cloud: Cloud, doc: Json) -> None:
    """Remember a vault that is being deleted: its name is not free yet."""
    arm_id = _deleted_id(doc)
    properties = {"vaultId": doc["id"], "location": doc["location"], "tags": doc.get("tags") or {}}
    cloud.put(arm_id, _DELETED_KIND, {"properties": properties})


def _deleted_id(doc: Json) -> str:
    parts = doc["id"].split("/")
    return _DELETED.format(sub=parts[2], loc=doc["location"], name=parts[-1])


def _check_deleted(cloud: Cloud, arm_id: str, kind: str, body: Json) -> None:
    if kind != _VAULT:
        return
    deleted = _deleted_id({"id": arm_id, "location": body["location"]})
    if cloud.get(deleted) is None:
        return
    if (body.get("properties") or {}).get("createMode") != "recover":
        raise AzureError(
            409,
            "ConflictError",
            "A vault with the same name already exists in deleted state. You need to either "
            "recover or purge existing key vault.",
        )
    cloud.delete(deleted)


@route("GET", ARM, _SUBSCRIPTION + "/deletedVaults")
def list_deleted_vaults(cloud: Cloud, request: Request) -> Reply:
    """The vaults that can be recovered or purged."""
    return listed(cloud.children(request.id(_SUBSCRIPTION), _DELETED_KIND))


@route("GET", ARM, _DELETED)
def get_deleted_vault(cloud: Cloud, request: Request) -> Reply:
    """One of them."""
    return Reply(200, public(cloud.need(request.id(_DELETED), "deleted vault")))


@route("POST", ARM, _DELETED + "/purge")
def purge_vault(cloud: Cloud, request: Request) -> Reply:
    """Free its name."""
    found = cloud.need(request.id(_DELETED), "deleted vault")
    return cloud.accepted(found, cloud.operate(found, kind="delete"), 202, body=False)
