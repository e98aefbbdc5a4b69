"""Subscriptions, resource groups and budgets, templates, and what a workspace stands on.

Of templates the one with which azure-ai-ml makes a workspace is carried out; others are refused.
"""

from __future__ import annotations

import re
import shutil

from . import workspaces
from .cloud import POLL, Cloud, check_location, listed, need_group, on_get, public, route, stamps
from .identity import TENANT
from .wire import ARM, GROUP, AzureError, Json, Reply, Request, bad, not_found

_SUBSCRIPTION = "/subscriptions/{sub}"
_PROVIDER = _SUBSCRIPTION + "/providers/{namespace}"
_GROUP_KIND = "Microsoft.Resources/resourceGroups"
_GROUP_NAME = re.compile(r"[-\w.()]{0,89}[-\w()]")


@route("GET", ARM, _SUBSCRIPTION)
def get_subscription(_cloud: Cloud, request: Request) -> Reply:
    """Every subscription is the caller's and enabled ("Subscriptions - Get")."""
    own = {"id": request.id(_SUBSCRIPTION), "subscriptionId": request.args["sub"]}
    return Reply(200, {**own, "tenantId": TENANT, "displayName": "Rehearsed", "state": "Enabled"})


@route("GET", ARM, _PROVIDER)
def get_provider(_cloud: Cloud, request: Request) -> Reply:
    """Every resource provider is registered."""
    names = {"id": request.id(_PROVIDER), "namespace": request.args["namespace"]}
    return Reply(200, {**names, "registrationState": "Registered", "resourceTypes": []})


register_provider = route("POST", ARM, _PROVIDER + "/register")(get_provider)


@route("PUT", ARM, GROUP)
def put_group(cloud: Cloud, request: Request) -> Reply:
    """Make or update a resource group."""
    name, body = request.args["rg"], request.json()
    location = check_location(body.get("location"))
    if not _GROUP_NAME.fullmatch(name):
        raise bad(f"The resource group name '{name}' is invalid.", "InvalidResourceGroupName")
    before = cloud.get(request.id(GROUP))
    if before and before["location"] != location:
        text = f"Invalid resource group location '{location}'. The resource group already exists "
        text += f"in location '{before['location']}'."
        raise AzureError(409, "InvalidResourceGroupLocation", text)
    document = {
        "location": location,
        "tags": body.get("tags") or {},
        "properties": {"provisioningState": "Succeeded"},
    }
    group = cloud.put(request.id(GROUP), _GROUP_KIND, document)
    return Reply(200 if before else 201, public(group))


on_get(GROUP, need_group)


@route("HEAD", ARM, GROUP)
def check_group(cloud: Cloud, request: Request) -> Reply:
    """Whether it exists."""
    return Reply(204 if cloud.get(request.id(GROUP)) else 404)


@route("DELETE", ARM, GROUP)
def delete_group(cloud: Cloud, request: Request) -> Reply:
    """Delete the group with everything in it, unless a job still runs there."""
    group = need_group(cloud, request)
    cloud.release(group["id"])  # its 409 comes before anything is gone
    for doc in cloud.children(group["id"]):
        _before_delete(cloud, doc)
    return cloud.accepted(group, cloud.operate(group, kind="delete"), 202, body=False)


@route("GET", ARM, GROUP + "/resources")
def list_resources(cloud: Cloud, request: Request) -> Reply:
    """The top-level resources of a group; deployments and role assignments are not among them."""
    prefix = need_group(cloud, request)["id"] + "/providers"
    depth = len(prefix.split("/")) + 3  # /NAMESPACE/TYPE/NAME; what lies deeper is a child
    docs = [d for d in cloud.children(prefix) if len(d["id"].split("/")) == depth]
    hidden = ("Microsoft.Resources/", "Microsoft.Authorization/")
    return listed([doc for doc in docs if not doc["type"].startswith(hidden)])


_TAG_FILTER = re.compile(r"tagName eq '([^']+)' and tagValue eq '([^']*)'")


@route("GET", ARM, _SUBSCRIPTION + "/resources")
def list_tagged(cloud: Cloud, request: Request) -> Reply:
    """The top-level resources of a subscription that carry a tag."""
    match = _TAG_FILTER.fullmatch(request.query.get("$filter", ""))
    if match is None:
        raise AzureError(501, "NotRehearsed", "Listing a subscription by anything but one tag")
    docs = [
        doc
        for doc in cloud.children(request.id(_SUBSCRIPTION) + "/resourceGroups")
        # The same depth: "", subscriptions, S, resourceGroups, G, providers, NAMESPACE, TYPE, NAME.
        if len(doc["id"].split("/")) == 9 and (doc.get("tags") or {}).get(match[1]) == match[2]
    ]
    return listed(docs)


# --- the two addresses at which a long-running operation is polled ---

_OPERATION = _SUBSCRIPTION + "/providers/{ns}/locations/{loc}/"


@route("GET", ARM, _OPERATION + "operationsStatus/{op}")
def operation_status(cloud: Cloud, request: Request) -> Reply:
    """Whether it still runs."""
    operation = cloud.operations.get(request.args["op"])
    if operation is None:
        raise not_found("operation", request.args["op"])
    running = operation.status == "InProgress"
    body: Json = {"id": request.path, "name": operation.name, "status": operation.status}
    body["percentComplete"] = 50.0 if running else 100.0
    if operation.error:
        body["error"] = operation.error
    return Reply(200, body, POLL if running else {})


@route("GET", ARM, _OPERATION + "operationResults/{op}")
def operation_result(cloud: Cloud, request: Request) -> Reply:
    """The resource that it worked on, once it has ended."""
    operation = cloud.operations.get(request.args["op"])
    if operation is None:
        raise not_found("operation", request.args["op"])
    if operation.status == "InProgress":
        return Reply(202, None, {"Location": f"https://{ARM}{request.target}", **POLL})
    if operation.error:
        return Reply(400, {"error": operation.error})
    resource = cloud.get(operation.resource)
    return Reply(200, public(resource)) if resource else Reply(204)


# --- template deployments ---

_DEPLOYMENT = GROUP + "/providers/Microsoft.Resources/deployments/{deployment}"
_STORAGE, _VAULT = "Microsoft.Storage/storageAccounts", "Microsoft.KeyVault/vaults"
_INSIGHTS, _REGISTRY = "Microsoft.Insights/components", "Microsoft.ContainerRegistry/registries"
# What the template may create next to the workspace: its parameter, the type, created by default.
_PARTS = (
    ("storageAccount", _STORAGE, "new"),
    ("keyVault", _VAULT, "new"),
    ("applicationInsights", _INSIGHTS, "new"),
    ("containerRegistry", _REGISTRY, "none"),
)


@route("PUT", ARM, _DEPLOYMENT)
def put_deployment(cloud: Cloud, request: Request) -> Reply:
    """Carry out a template deployment."""
    need_group(cloud, request)
    properties = request.json().get("properties") or {}
    values = {name: p.get("value") for name, p in (properties.get("parameters") or {}).items()}
    kinds = {r.get("type") for r in (properties.get("template") or {}).get("resources", [])}
    if "workspaceName" not in values or workspaces.KIND not in kinds:
        raise AzureError(501, "NotRehearsed", "Only the workspace template of the SDK is rehearsed")
    workspace = f"{request.id(GROUP)}/providers/{workspaces.KIND}/{values['workspaceName']}"
    stood = cloud.get(workspace) is not None
    resources = [{"id": arm_id} for arm_id in _make_from_template(cloud, request, values)]
    state = {"provisioningState": "Accepted", "mode": "Incremental", "duration": "PT2S"}
    times = {"timestamp": stamps()["createdAt"], "outputResources": resources}
    document: Json = {"properties": {**state, **times}}
    # A new workspace is there when the operation ends, not before (Cloud.finish).
    made = [] if stood else [cloud.resources.pop(resources[-1]["id"].lower())]
    document["_makes"] = made
    deployment = cloud.put(request.id(_DEPLOYMENT), "Microsoft.Resources/deployments", document)
    return cloud.accepted(deployment, cloud.operate(deployment), 201)


def _make_from_template(cloud: Cloud, request: Request, values: Json) -> list[str]:
    """The ids of the workspace and of what was made with it, from the template's parameters."""
    location = check_location(values.get("location"))
    created, ids = [], {}
    for part, kind, default in _PARTS:
        state = values.get(f"{part}Option") or default
        if state == "none" or values.get("kind", "").lower() == "project":
            continue
        group = values.get(f"{part}ResourceGroupName") or request.args["rg"]
        arm_id = request.id(GROUP, rg=group) + f"/providers/{kind}/{values[f'{part}Name']}"
        ids[part] = arm_id
        if state == "new":
            _put_part(cloud, arm_id, kind, {"location": location})
            created.append(arm_id)
        else:
            cloud.need(arm_id, kind)
    optional = {
        "hubResourceId": values.get("workspace_hub"),
        "primaryUserAssignedIdentity": values.get("primaryUserAssignedIdentity"),
    }
    texts = {name: values.get(name) for name in ("friendlyName", "description")}
    body = {
        "location": location,
        "kind": values.get("kind") or "default",
        "identity": values.get("identity"),
        "tags": values.get("tagValues") or {},
        "properties": {**texts, **{k: v or None for k, v in optional.items()}, **ids},
    }
    arm_id = request.id(GROUP) + f"/providers/{workspaces.KIND}/{values['workspaceName']}"
    workspaces.make(cloud, arm_id, body)
    return [*created, arm_id]


def _need_deployment(cloud: Cloud, request: Request) -> Json:
    return cloud.need(request.id(_DEPLOYMENT), "deployment")


on_get(_DEPLOYMENT, _need_deployment)


@route("GET", ARM, GROUP + "/deployments/{deployment}/operations")
def list_deployment_operations(cloud: Cloud, request: Request) -> Reply:
    """What the deployment made, one operation each: the SDK shows them as progress."""
    properties = _need_deployment(cloud, request)["properties"]
    operations = []
    for doc in filter(None, (cloud.get(item["id"]) for item in properties["outputResources"])):
        target = {"id": doc["id"], "resourceType": doc["type"], "resourceName": doc["name"]}
        state = {
            "provisioningOperation": "Create",
            "provisioningState": properties["provisioningState"],
            "statusCode": "OK",
            "serviceRequestId": "rehearsal",
            "targetResource": target,
        }
        operations.append({"id": doc["id"], "operationId": doc["name"], "properties": state})
    return Reply(200, {"value": operations})


# --- what a workspace stands on: storage, key vault, logs, insights, registry; search ---

# Azure's rules for their names (learn.microsoft.com/azure/azure-resource-manager/management, page
# resource-name-rules).
_PART_NAMES = {
    _STORAGE: r"[a-z0-9]{3,24}",
    _VAULT: r"[A-Za-z](?!.*--)[A-Za-z0-9-]{1,22}[A-Za-z0-9]",
    _INSIGHTS: r"[^%&\\?/]{1,260}",
    "Microsoft.OperationalInsights/workspaces": r"[A-Za-z0-9][A-Za-z0-9-]{2,61}[A-Za-z0-9]",
    _REGISTRY: r"[A-Za-z0-9]{5,50}",
    "Microsoft.Search/searchServices": r"(?!.*--)[a-z0-9][a-z0-9-]{0,58}[a-z0-9]",
}
# The name of a key vault stays reserved for 90 days after it is deleted.
_DELETED_KIND = "Microsoft.KeyVault/deletedVaults"
_DELETED = "/subscriptions/{sub}/providers/Microsoft.KeyVault/locations/{loc}/deletedVaults/{name}"
_PART = GROUP + f"/providers/{{kind:{'|'.join(_PART_NAMES)}}}/{{name}}"


def _deleted_id(vault_id: str, location: str) -> str:
    parts = vault_id.split("/")
    return _DELETED.format(sub=parts[2], loc=location, name=parts[-1])


def _put_part(cloud: Cloud, arm_id: str, kind: str, body: Json) -> Json:
    """Store a storage account, key vault, registry …, if its name is allowed and free."""
    name = arm_id.rsplit("/", 1)[-1]
    if not re.fullmatch(_PART_NAMES[kind], name):
        raise bad(f"'{name}' is not a valid name for {kind}.", "AccountNameInvalid")
    deleted = _deleted_id(arm_id, body["location"])
    if kind == _VAULT and cloud.get(deleted):
        if (body.get("properties") or {}).get("createMode") != "recover":
            text = "A vault with the same name already exists in deleted state. You need to either "
            raise AzureError(409, "ConflictError", text + "recover or purge existing key vault.")
        cloud.delete(deleted)
    document: Json = {k: body[k] for k in ("location", "sku", "kind", "tags") if k in body}
    addresses: Json = {
        _STORAGE: {"primaryEndpoints": {"blob": f"https://{name}.blob.core.windows.net/"}},
        _REGISTRY: {"loginServer": f"{name}.azurecr.io"},
        _VAULT: {"vaultUri": f"https://{name}.vault.azure.net/"},
    }
    state = {"provisioningState": "Succeeded", **addresses.get(kind, {})}
    document["properties"] = {**(body.get("properties") or {}), **state}
    return cloud.put(arm_id, kind, document)


@route("PUT", ARM, _PART)
def put_part(cloud: Cloud, request: Request) -> Reply:
    """Make one of them."""
    need_group(cloud, request)
    body, wanted = request.json(), request.args["kind"].lower()
    check_location(body.get("location"))
    before = cloud.get(request.id(_PART))
    kind = next(kind for kind in _PART_NAMES if kind.lower() == wanted)
    part = _put_part(cloud, request.id(_PART), kind, body)
    return Reply(200 if before else 201, public(part))


on_get(_PART, lambda cloud, request: cloud.need(request.id(_PART), request.args["kind"]))


@route("DELETE", ARM, _PART)
def delete_part(cloud: Cloud, request: Request) -> Reply:
    """Delete one of them."""
    part = cloud.get(request.id(_PART))
    if part is not None:
        _before_delete(cloud, part)
    return cloud.delete_now(request.id(_PART))


def _before_delete(cloud: Cloud, doc: Json) -> None:
    """The files of a storage account go with it; the name of a key vault stays reserved."""
    if doc["type"] == _STORAGE:
        for kind in ("blobs", "blobmeta", "shares"):
            shutil.rmtree(cloud.folder / kind / doc["name"], ignore_errors=True)
    if doc["type"] == _VAULT:
        properties = {"vaultId": doc["id"], "location": doc["location"]}
        deleted = {"properties": {**properties, "tags": doc.get("tags") or {}}}
        cloud.put(_deleted_id(doc["id"], doc["location"]), _DELETED_KIND, deleted)


# --- budgets of a resource group; none of them ever mails here ---
# learn.microsoft.com/rest/api/consumption/budgets.

_BUDGET_KIND = "Microsoft.Consumption/budgets"
_BUDGET = GROUP + f"/providers/{_BUDGET_KIND}/{{budget}}"
_NOTIFICATIONS = 5  # the most that a budget has


@route("PUT", ARM, _BUDGET)
def put_budget(cloud: Cloud, request: Request) -> Reply:
    """Make a budget or change it."""
    need_group(cloud, request)
    given = request.json().get("properties") or {}
    start = str((given.get("timePeriod") or {}).get("startDate", ""))
    if given.get("category") != "Cost" or given.get("timeGrain") != "Monthly":
        raise AzureError(501, "NotRehearsed", "Budgets other than of a month's costs")
    if not isinstance(given.get("amount"), int | float) or given["amount"] <= 0:
        raise bad("The amount of a budget must be greater than 0.", "400")
    if start[8:10] != "01":
        raise bad("The start date of a budget must be the first of a month.", "400")
    notifications = given.get("notifications") or {}
    if len(notifications) > _NOTIFICATIONS:
        raise bad(f"A budget has at most {_NOTIFICATIONS} notifications.", "400")
    for name, notification in notifications.items():
        kinds = notification.get("thresholdType"), notification.get("operator")
        if kinds[0] not in ("Actual", "Forecasted") or kinds[1] != "GreaterThan":
            raise bad(f"The notification '{name}' is invalid.", "400")
        if not notification.get("contactEmails"):
            raise bad(f"The notification '{name}' has nobody to mail to.", "400")
    before = cloud.get(request.id(_BUDGET))
    budget = cloud.put(request.id(_BUDGET), _BUDGET_KIND, {"properties": given})
    return Reply(200 if before else 201, public(budget))


on_get(_BUDGET, lambda cloud, request: cloud.need(request.id(_BUDGET), "budget"))


@route("DELETE", ARM, _BUDGET)
def delete_budget(cloud: Cloud, request: Request) -> Reply:
    """Delete it."""
    return cloud.delete_now(request.id(_BUDGET))
