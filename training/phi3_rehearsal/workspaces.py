"""Workspaces, hubs and projects, and what lies in them: datastores, connections, flows.

A hub cannot be deleted while it has projects; a project lives in the region of its hub.
Connections keep their secrets sealed. Flows lie in the workspace's file share.
"""

from __future__ import annotations

import re
import uuid

import yaml

from .cloud import CALLER, TENANT, Cloud, check_location, listed, need_group, public, route, stamps
from .storage import account_key, account_sas, share_file
from .wire import ARM, GROUP, ML, REGIONAL, WORKSPACE, AzureError, Json, Reply, Request, bad

KIND = f"{ML}/workspaces"
_DELETED_KIND = f"{ML}/deletedWorkspaces"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{2,32}")
# Where Prompt flow and the studio keep people's files; Azure's own name for the share.
FILE_SHARE = "code-391ff5ac-6576-460f-ba4d-7e03433c68b6"
WORKING_DIRECTORY = "workspaceworkingdirectory"
# The blob stores every workspace has, and the container behind each.
DATASTORES = {"workspaceblobstore": "azureml-blobstore", "workspaceartifactstore": "azureml"}


def make(cloud: Cloud, arm_id: str, body: Json) -> Json:
    """Store a workspace after Azure's checks. Raises AzureError."""
    name, kind = arm_id.rsplit("/", 1)[-1], str(body.get("kind") or "default").lower()
    if not _NAME.fullmatch(name):
        raise bad(
            f"Workspace name '{name}' is invalid: it must be 3 to 33 characters long, contain "
            "letters, digits, hyphens and underscores only, and start with a letter or digit.",
            "ValidationError",
        )
    given = {k: v for k, v in (body.get("properties") or {}).items() if v is not None}
    before = cloud.get(arm_id)
    if before is None and cloud.get(_deleted_id(arm_id)):
        raise AzureError(
            409,
            "Conflict",
            f"Soft-deleted workspace exists: '{name}'. Please purge or recover it, or use another "
            "name.",
        )
    if kind == "project":
        _check_hub(cloud, given.get("hubResourceId"), body)
        hub = cloud.need(given["hubResourceId"], "hub")["properties"]
        for part in ("storageAccount", "keyVault", "containerRegistry", "applicationInsights"):
            given[part] = hub.get(part)
    else:
        for part in ("storageAccount", "keyVault"):
            cloud.need(given.get(part) or "", part)
    location = body["location"]
    workspace_id = (before or {}).get("properties", {}).get("workspaceId") or str(uuid.uuid4())
    base = f"{location}.api.azureml.ms"
    properties = {
        "containerRegistry": None,
        "applicationInsights": None,
        "publicNetworkAccess": "Enabled",
        "v1LegacyMode": False,
        **given,
        "provisioningState": "Succeeded",
        "workspaceId": workspace_id,
        "tenantId": TENANT,
        "discoveryUrl": f"https://{base}/discovery",
        "mlFlowTrackingUri": f"azureml://{base}/mlflow/v1.0{arm_id}",
        "creationTime": stamps()["createdAt"],
    }
    document: Json = {
        "location": location,
        "kind": body.get("kind") or "Default",
        "tags": body.get("tags") or {},
        "identity": _identity(cloud, arm_id, body.get("identity")),
        "sku": {"name": "Basic", "tier": "Basic"},
        "systemData": stamps(),
        "properties": properties,
    }
    return cloud.put(arm_id, KIND, document)


def _deleted_id(arm_id: str) -> str:
    return f"/deleted{arm_id}"


def _check_hub(cloud: Cloud, hub_id: str | None, body: Json) -> None:
    hub = cloud.get(hub_id or "")
    if hub is None or str(hub["kind"]).lower() != "hub":
        raise bad(f"The hub '{hub_id}' of the project was not found.", "ValidationError")
    if hub["location"] != body["location"]:
        raise bad(
            f"The project's location '{body['location']}' must match that of its hub "
            f"('{hub['location']}').",
            "ValidationError",
        )


def _identity(cloud: Cloud, arm_id: str, given: Json | None) -> Json:
    identity: Json = {"type": (given or {}).get("type") or "SystemAssigned"}
    if "SystemAssigned" in identity["type"]:
        identity |= {"principalId": str(uuid.uuid5(uuid.NAMESPACE_URL, arm_id)), "tenantId": TENANT}
    users = (given or {}).get("userAssignedIdentities") or (given or {}).get(
        "user_assigned_identities"
    )
    if users:
        found = {user: cloud.need(user, "identity")["properties"] for user in users}
        identity["userAssignedIdentities"] = {
            user: {"principalId": p["principalId"], "clientId": p["clientId"]}
            for user, p in found.items()
        }
    return identity


@route("GET", ARM, WORKSPACE)
def get_workspace(cloud: Cloud, request: Request) -> Reply:
    """One workspace, hub or project."""
    return Reply(200, public(need_workspace(cloud, request)))


@route("PUT", ARM, WORKSPACE)
def put_workspace(cloud: Cloud, request: Request) -> Reply:
    """Make one without a template."""
    need_group(cloud, request)
    body = request.json()
    body["location"] = check_location(body.get("location"))
    before = cloud.get(request.id(WORKSPACE))
    made = make(cloud, request.id(WORKSPACE), body)
    made["properties"]["provisioningState"] = "Creating"
    return cloud.accepted(made, cloud.operate(made), 200 if before else 201)


@route("PATCH", ARM, WORKSPACE)
def patch_workspace(cloud: Cloud, request: Request) -> Reply:
    """Update tags and properties."""
    found, body = need_workspace(cloud, request), request.json()
    merged = {
        **{k: found.get(k) for k in ("location", "kind", "identity", "tags")},
        **{k: body[k] for k in ("tags", "identity") if body.get(k)},
        "properties": {**found["properties"], **(body.get("properties") or {})},
    }
    return Reply(200, public(make(cloud, found["id"], merged)))


@route("DELETE", ARM, WORKSPACE)
def delete_workspace(cloud: Cloud, request: Request) -> Reply:
    """Delete it; a workspace is kept 14 days unless purged, a hub not while it has projects."""
    found = cloud.get(request.id(WORKSPACE))
    if found is None:
        return Reply(204)
    for other in cloud.children("/subscriptions", KIND):
        if str(other["properties"].get("hubResourceId") or "").lower() == found["id"].lower():
            raise AzureError(
                409,
                "Conflict",
                f"The hub '{found['name']}' cannot be deleted: the project '{other['name']}' "
                "belongs to it.",
            )
    cloud.release(found["id"])
    if request.query.get("forcetopurge", "").lower() != "true":
        cloud.put(_deleted_id(found["id"]), _DELETED_KIND, {"properties": {"id": found["id"]}})
    operation = cloud.operate(found, kind="delete")
    return cloud.accepted(found, operation, 202, body=False)


@route("GET", ARM, GROUP + f"/providers/{KIND}")
def list_workspaces(cloud: Cloud, request: Request) -> Reply:
    """All of a resource group."""
    return listed(cloud.children(request.id(GROUP), KIND))


@route("GET", ARM, f"/subscriptions/{{sub}}/providers/{KIND}")
def list_all_workspaces(cloud: Cloud, request: Request) -> Reply:
    """All of a subscription."""
    return listed(cloud.children(request.id("/subscriptions/{sub}"), KIND))


@route("GET", REGIONAL, "/discovery", audience="")
def discovery(_cloud: Cloud, request: Request) -> Reply:
    """Where the data plane of the region is."""
    base = f"https://{request.host}"
    names = ("api", "history", "modelmanagement", "mlflow", "studio", "experimentation")
    return Reply(200, dict.fromkeys(names, base))


_STORE = WORKSPACE + "/datastores/{store}"


@route("GET", ARM, _STORE)
def get_datastore(cloud: Cloud, request: Request) -> Reply:
    """One of the two stores that every workspace has."""
    return Reply(200, _datastore(cloud, request, request.args["store"]))


@route("GET", ARM, WORKSPACE + "/datastores")
def list_datastores(cloud: Cloud, request: Request) -> Reply:
    """The stores; `isDefault=true` names one."""
    names = [*DATASTORES, WORKING_DIRECTORY]
    if request.query.get("isdefault") == "true":
        names = names[:1]
    return Reply(200, {"value": [_datastore(cloud, request, name) for name in names]})


@route("POST", ARM, _STORE + "/listSecrets")
def list_datastore_secrets(cloud: Cloud, request: Request) -> Reply:
    """A signature for the account, or its key where no expiring secret is asked for."""
    account = storage_account(need_workspace(cloud, request))
    _datastore(cloud, request, request.args["store"])
    asked = request.json() if request.body else {}
    # The SDK signs log addresses itself with what it gets for the artifact store.
    if asked.get("expirableSecret") and request.args["store"] != "workspaceartifactstore":
        return Reply(200, {"secretsType": "Sas", "sasToken": account_sas(cloud, account)})
    key = account_key(cloud, account)
    if asked.get("expirableSecret"):
        return Reply(200, {"secretsType": "Sas", "sasToken": key})
    return Reply(200, {"secretsType": "AccountKey", "key": key})


def _datastore(cloud: Cloud, request: Request, name: str) -> Json:
    workspace = need_workspace(cloud, request)
    if name in DATASTORES:
        place = {"datastoreType": "AzureBlob", "containerName": container_of(workspace, name)}
    elif name == WORKING_DIRECTORY:
        place = {"datastoreType": "AzureFile", "fileShareName": FILE_SHARE}
    else:
        raise AzureError(404, "UserError", f"No datastore named '{name}' was found.")
    return {
        "id": f"{workspace['id']}/datastores/{name}",
        "name": name,
        "type": f"{KIND}/datastores",
        "properties": {
            **place,
            "accountName": storage_account(workspace),
            "endpoint": "core.windows.net",
            "protocol": "https",
            "isDefault": name == "workspaceblobstore",
            "serviceDataAccessAuthIdentity": "WorkspaceSystemAssignedIdentity",
            "credentials": {"credentialsType": "AccountKey"},
            "tags": {},
        },
        "systemData": workspace["systemData"],
    }


def container_of(workspace: Json, store: str) -> str:
    """The container behind a datastore."""
    if store not in DATASTORES:
        raise bad(f"No datastore named '{store}' was found.")
    suffix = f"-{workspace['properties']['workspaceId']}" if store == "workspaceblobstore" else ""
    return DATASTORES[store] + suffix


def storage_account(workspace: Json) -> str:
    """The name of the workspace's storage account."""
    return str(workspace["properties"]["storageAccount"]).rsplit("/", 1)[-1]


def need_workspace(cloud: Cloud, request: Request) -> Json:
    """The workspace of the request. Raises AzureError (404)."""
    need_group(cloud, request)
    text = (
        f"The Resource '{KIND}/{request.args['ws']}' under resource group "
        f"'{request.args['rg']}' was not found."
    )
    return cloud.need(request.id(WORKSPACE), message=text)


# --- connections ---

_CONNECTION_KIND = f"{ML}/workspaces/connections"
_CONNECTION = WORKSPACE + "/connections/{name}"
_CONNECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{2,32}")
# What each way of signing in carries.
_CREDENTIALS = {
    "CustomKeys": {"keys"},
    "ApiKey": {"key"},
    "None": set(),
    "AAD": set(),
    "PAT": {"pat"},
    "SAS": {"sas"},
    "AccountKey": {"accountKey"},
    "ManagedIdentity": {"clientId", "resourceId"},
}


@route("PUT", ARM, _CONNECTION)
def put_connection(cloud: Cloud, request: Request) -> Reply:
    """Make or replace a connection."""
    need_workspace(cloud, request)
    name, given = request.args["name"], request.json().get("properties") or {}
    if not _CONNECTION_NAME.fullmatch(name):
        raise bad(f"The connection name '{name}' is invalid.", "ValidationError")
    _check_connection(given)
    sealed = cloud.seal(given.get("credentials"))
    properties = {k: v for k, v in given.items() if k != "credentials"}
    document = {
        "properties": {**properties, "group": "AzureAI", "createdByWorkspaceArmId": None},
        "systemData": stamps(),
        "_sealed": sealed,
    }
    return Reply(200, public(cloud.put(request.id(_CONNECTION), _CONNECTION_KIND, document)))


def _check_connection(given: Json) -> None:
    way = given.get("authType")
    if way not in _CREDENTIALS:
        raise bad(f"The authType '{way}' is not supported.", "ValidationError")
    if not given.get("category") or not given.get("target"):
        raise bad("The connection needs a category and a target.", "ValidationError")
    credentials = given.get("credentials") or {}
    missing = _CREDENTIALS[way] - set(credentials)
    if missing:
        raise bad(f"The credentials lack {', '.join(sorted(missing))}.", "ValidationError")
    if way == "CustomKeys":
        values = credentials["keys"]
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise bad("The custom keys must be strings.", "ValidationError")
    metadata = given.get("metadata") or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise bad("The connection's metadata must be strings.", "ValidationError")


@route("GET", ARM, _CONNECTION)
def get_connection(cloud: Cloud, request: Request) -> Reply:
    """One connection, without its secrets."""
    found = _need_connection(cloud, request)
    shown = public(found)
    if found["properties"].get("authType") == "CustomKeys":
        shown["properties"]["credentials"] = None
    return Reply(200, shown)


@route("GET", ARM, WORKSPACE + "/connections")
def list_connections(cloud: Cloud, request: Request) -> Reply:
    """All of a workspace; a project has its hub's shared ones as well."""
    workspace = need_workspace(cloud, request)
    found = cloud.children(workspace["id"], _CONNECTION_KIND)
    hub = workspace["properties"].get("hubResourceId")
    if hub:
        shared = cloud.children(hub, _CONNECTION_KIND)
        found += [doc for doc in shared if doc["properties"].get("isSharedToAll")]
    category = request.query.get("category")
    chosen = [d for d in found if not category or d["properties"]["category"] == category]
    return Reply(200, {"value": [public(doc) for doc in chosen]})


@route("POST", ARM, _CONNECTION + "/listsecrets")
def list_connection_secrets(cloud: Cloud, request: Request) -> Reply:
    """One connection with its secrets."""
    found = _need_connection(cloud, request)
    shown = public(found)
    shown["properties"]["credentials"] = cloud.unseal(found["_sealed"])
    return Reply(200, shown)


@route("DELETE", ARM, _CONNECTION)
def delete_connection(cloud: Cloud, request: Request) -> Reply:
    """Delete it."""
    need_workspace(cloud, request)
    return cloud.delete_now(request.id(_CONNECTION))


def _need_connection(cloud: Cloud, request: Request) -> Json:
    workspace = need_workspace(cloud, request)
    found = cloud.get(request.id(_CONNECTION))
    hub = workspace["properties"].get("hubResourceId")
    if found is None and hub:
        above = cloud.get(f"{hub}/connections/{request.args['name']}")
        found = above if above and above["properties"].get("isSharedToAll") else None
    if found is None:
        name = request.args["name"]
        raise AzureError(404, "UserError", f"Connection {name} can't be found in this workspace")
    return found


# --- Prompt flow's service: flows, and the index that lists them ---

_FLOW_KIND = f"{ML}/workspaces/flows"
_FLOWS = "/flow/api" + WORKSPACE + "/Flows"


@route("POST", REGIONAL, _FLOWS, audience="regional")
def create_flow(cloud: Cloud, request: Request) -> Reply:
    """Make a flow of the files that were uploaded before."""
    workspace, body = need_workspace(cloud, request), request.json()
    path = str(body.get("flowDefinitionFilePath") or "")
    file = share_file(cloud, storage_account(workspace), FILE_SHARE, path)
    if not file.is_file():
        raise bad(f"The flow definition '{path}' was not found in the file share.")
    try:
        graph = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        graph = None
    if not isinstance(graph, dict) or not graph.get("nodes"):
        raise bad(f"The flow definition '{path}' is not a flow.")
    for node in graph["nodes"]:
        source = node.get("source") or {}
        if source.get("type") == "code" and not (file.parent / str(source.get("path"))).is_file():
            raise bad(f"The node '{node.get('name')}' names a file that was not uploaded.")
    name = str(uuid.uuid4())
    document = {
        "properties": {
            "flowId": name,
            "flowName": body.get("flowName"),
            "flowType": body.get("flowType") or "default",
            "description": body.get("description"),
            "tags": body.get("tags") or {},
            "flowDefinitionFilePath": path,
            "isArchived": False,
            "createdDate": stamps()["createdAt"],
            "owner": {"userObjectId": CALLER, "userTenantId": TENANT, "userName": "rehearsal"},
        },
        "systemData": stamps(),
    }
    return Reply(
        200, _flow_answer(cloud.put(f"{workspace['id']}/flows/{name}", _FLOW_KIND, document))
    )


@route("GET", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def get_flow(cloud: Cloud, request: Request) -> Reply:
    """One flow."""
    return Reply(200, _flow_answer(_need_flow(cloud, request)))


@route("PUT", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def update_flow(cloud: Cloud, request: Request) -> Reply:
    """Change name, description or tags; the files of a flow stay."""
    found, body = _need_flow(cloud, request), request.json()
    for key in ("flowName", "description", "tags", "isArchived"):
        if body.get(key) is not None:
            found["properties"][key] = body[key]
    return Reply(200, b'""', {"Content-Type": "application/json"})


@route("DELETE", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def delete_flow(cloud: Cloud, request: Request) -> Reply:
    """Forget a flow; its files stay in the share."""
    cloud.delete(_need_flow(cloud, request)["id"])
    return Reply(200)


@route("POST", REGIONAL, "/index/v1.0" + WORKSPACE + "/entities", audience="regional")
def list_entities(cloud: Cloud, request: Request) -> Reply:
    """The flows, newest first, as the index service tells them."""
    workspace = need_workspace(cloud, request)
    docs = cloud.children(workspace["id"], _FLOW_KIND)[::-1]
    entities = []
    for doc in docs:
        own = doc["properties"]
        properties = {k: own[k] for k in ("flowId", "flowType", "flowDefinitionFilePath")}
        names = ("flowName", "description", "tags", "owner", "isArchived", "createdDate")
        annotations = {k: own[k] for k in names}
        identity = f"azureml://location/{workspace['location']}/flows/{own['flowId']}"
        entities.append(
            {"entityId": identity, "properties": properties, "annotations": annotations}
        )
    return Reply(200, {"value": entities, "totalCount": len(entities)})


def _need_flow(cloud: Cloud, request: Request) -> Json:
    workspace, name = need_workspace(cloud, request), request.args["flow"]
    text = f"Flow with id {name} not found"
    return cloud.need(f"{workspace['id']}/flows/{name}", code="UserError", message=text)


def _flow_answer(doc: Json) -> Json:
    properties: Json = public(doc)["properties"]
    workspace = doc["id"].rsplit("/flows/", 1)[0]
    page = f"https://ml.azure.com/prompts/flow/{properties['flowId']}/details?wsid={workspace}"
    return {
        **properties,
        "flowResourceId": doc["id"],
        "studioPortalEndpoint": page,
        "experimentId": workspace,
    }
