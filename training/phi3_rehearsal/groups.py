"""Subscriptions, resource groups, operations in progress and template deployments.

The workspace template of azure-ai-ml is carried out; other templates are refused.
"""

from __future__ import annotations

import re

from . import resources, teardown, workspaces
from .cloud import POLL, TENANT, Cloud, listed, public, route, stamps
from .regions import REGIONS, check_location, need_group
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
    teardown.release(cloud, group["id"])
    for doc in cloud.children(group["id"]):
        resources.before_delete(cloud, doc)
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
        "status": operation["status"],
        "percentComplete": 50.0 if operation["status"] == "InProgress" else 100.0,
    }
    if operation.get("error"):
        body["error"] = operation["error"]
    return Reply(200, body, POLL if operation["status"] == "InProgress" else {})


@route("GET", ARM, "/subscriptions/{sub}/providers/{ns}/locations/{loc}/operationResults/{op}")
def operation_result(cloud: Cloud, request: Request) -> Reply:
    """What a finished operation made."""
    operation = cloud.operations.get(request.args["op"])
    if operation is None:
        raise not_found("operation", request.args["op"])
    if operation["status"] == "InProgress":
        return Reply(202, None, {"Location": f"https://{ARM}{request.target}", **POLL})
    if operation.get("error"):
        return Reply(400, {"error": operation["error"]})
    found = cloud.get(operation["resource"])
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
            resources.put_plain(cloud, arm_id, kind, {"location": location})
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
