"""Workspaces, hubs and projects, and their contents: datastores, connections, flows.

Connections store their secrets encrypted; flows are in the workspace's file share.
"""

from __future__ import annotations

import re
import uuid

import yaml

from .cloud import Cloud, check_location, need_group, on_get, on_list, public, route, stamps
from .identity import CALLER, TENANT, user_identities
from .storage import account_key, account_sas, share_file
from .wire import ARM, GROUP, ML, REGIONAL, WORKSPACE, AzureError, Json, Reply, Request, bad

KIND = f"{ML}/workspaces"
_DELETED_KIND = f"{ML}/deletedWorkspaces"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{2,32}")
# Where Prompt flow and the studio keep people's files; Azure's own name for the share.
FILE_SHARE = "code-391ff5ac-6576-460f-ba4d-7e03433c68b6"
WORKING_DIRECTORY = "workspaceworkingdirectory"
# The blob stores that every workspace has, and their containers.
DATASTORES = {"workspaceblobstore": "azureml-blobstore", "workspaceartifactstore": "azureml"}


def make(cloud: Cloud, arm_id: str, body: Json) -> Json:
    """Store a workspace after Azure's checks. Raises AzureError."""
    name, kind = arm_id.rsplit("/", 1)[-1], str(body.get("kind") or "default").lower()
    location = body["location"]
    if not _NAME.fullmatch(name):
        text = f"Workspace name '{name}' is invalid: it must be 3 to 33 characters long, contain "
        text += "letters, digits, hyphens and underscores only, and start with a letter or digit."
        raise bad(text, "ValidationError")
    properties = {k: v for k, v in (body.get("properties") or {}).items() if v is not None}
    before = cloud.get(arm_id)
    if before and before["properties"]["provisioningState"] == "Deleting":
        raise AzureError(409, "Conflict", f"The workspace '{name}' is being deleted.")
    if before is None and cloud.get(_deleted_id(arm_id)):
        text = f"Soft-deleted workspace exists: '{name}'. Please purge or recover it, or use "
        raise AzureError(409, "Conflict", text + "another name.")
    if kind == "project":  # it lives in the region of its hub, on what the hub stands on
        hub_id = properties.get("hubResourceId")
        hub = cloud.get(hub_id or "")
        if hub is None or str(hub["kind"]).lower() != "hub":
            raise bad(f"The hub '{hub_id}' of the project was not found.", "ValidationError")
        if hub["location"] != location:
            text = f"The project's location '{location}' must match that of its hub "
            raise bad(text + f"('{hub['location']}').", "ValidationError")
        for part in ("storageAccount", "keyVault", "containerRegistry", "applicationInsights"):
            properties[part] = hub["properties"].get(part)
    else:
        for part in ("storageAccount", "keyVault"):
            cloud.need(properties.get(part) or "", part)
    # It stays when the workspace is made again: the name of its container has it.
    own_id = (before or {}).get("properties", {}).get("workspaceId") or str(uuid.uuid4())
    host = f"{location}.api.azureml.ms"
    document: Json = {
        "location": location,
        "kind": body.get("kind") or "Default",
        "tags": body.get("tags") or {},
        "identity": _identity(cloud, arm_id, body.get("identity") or {}),
        "sku": {"name": "Basic", "tier": "Basic"},
        "systemData": stamps(),
        "properties": {
            "containerRegistry": None,
            "applicationInsights": None,
            "publicNetworkAccess": "Enabled",
            "v1LegacyMode": False,
            **properties,
            "provisioningState": "Succeeded",
            "workspaceId": own_id,
            "tenantId": TENANT,
            "discoveryUrl": f"https://{host}/discovery",
            "mlFlowTrackingUri": f"azureml://{host}/mlflow/v1.0{arm_id}",
            "creationTime": stamps()["createdAt"],
        },
    }
    return cloud.put(arm_id, KIND, document)


def _deleted_id(arm_id: str) -> str:
    return f"/deleted{arm_id}"


def _identity(cloud: Cloud, arm_id: str, asked: Json) -> Json:
    identity: Json = {"type": asked.get("type") or "SystemAssigned"}
    if "SystemAssigned" in identity["type"]:
        identity |= {"principalId": str(uuid.uuid5(uuid.NAMESPACE_URL, arm_id)), "tenantId": TENANT}
    # The SDK's template spells it with underscores, the REST API does not.
    users = asked.get("userAssignedIdentities") or asked.get("user_assigned_identities")
    if users:
        identity["userAssignedIdentities"] = user_identities(cloud, users)
    return identity


@route("PUT", ARM, WORKSPACE)
def put_workspace(cloud: Cloud, request: Request) -> Reply:
    """Make one without a template."""
    need_group(cloud, request)
    body = request.json()
    body["location"] = check_location(body.get("location"))
    before = cloud.get(request.id(WORKSPACE))
    workspace = make(cloud, request.id(WORKSPACE), body)
    workspace["properties"]["provisioningState"] = "Creating"
    return cloud.accepted(workspace, cloud.operate(workspace), 200 if before else 201)


@route("PATCH", ARM, WORKSPACE)
def patch_workspace(cloud: Cloud, request: Request) -> Reply:
    """Update tags and properties."""
    # What azure-ai-ml calls when a workspace that exists is made again.
    workspace, body = need_workspace(cloud, request), request.json()
    merged = {
        **{k: workspace.get(k) for k in ("location", "kind", "identity", "tags")},
        **{k: body[k] for k in ("tags", "identity") if body.get(k)},
        "properties": {**workspace["properties"], **(body.get("properties") or {})},
    }
    return Reply(200, public(make(cloud, workspace["id"], merged)))


@route("DELETE", ARM, WORKSPACE)
def delete_workspace(cloud: Cloud, request: Request) -> Reply:
    """Delete it, but no hub with projects."""
    workspace = cloud.get(request.id(WORKSPACE))
    if workspace is None:
        return Reply(204)
    arm_id, name = workspace["id"], workspace["name"]
    for other in cloud.children("/subscriptions", KIND):
        if str(other["properties"].get("hubResourceId") or "").lower() == arm_id.lower():
            text = f"The hub '{name}' cannot be deleted: the project '{other['name']}' "
            raise AzureError(409, "Conflict", text + "belongs to it.")
    cloud.release(arm_id)
    # Soft-deleted for 14 days, and its name with it, unless it is purged.
    if request.query.get("forcetopurge", "").lower() != "true":
        cloud.put(_deleted_id(arm_id), _DELETED_KIND, {"properties": {"id": arm_id}})
    workspace["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(workspace, cloud.operate(workspace, kind="delete"), 202, body=False)


def need_workspace(cloud: Cloud, request: Request) -> Json:
    """The workspace of the request. Raises AzureError (404)."""
    need_group(cloud, request)
    text = f"The Resource '{KIND}/{request.args['ws']}' under resource group "
    text += f"'{request.args['rg']}' was not found."
    return cloud.need(request.id(WORKSPACE), message=text)


on_get(WORKSPACE, need_workspace)
on_list(f"{GROUP}/providers/{KIND}", need_group, KIND)


@route("GET", REGIONAL, "/discovery", audience="")
def discovery(_cloud: Cloud, request: Request) -> Reply:
    """Where the data plane of the region is."""
    names = ("api", "history", "modelmanagement", "mlflow", "studio", "experimentation")
    return Reply(200, dict.fromkeys(names, f"https://{request.host}"))


# --- datastores ---

_STORE = WORKSPACE + "/datastores/{store}"


@route("GET", ARM, WORKSPACE + "/datastores")
def list_datastores(cloud: Cloud, request: Request) -> Reply:
    """The stores; `isDefault=true` names one."""
    names = [*DATASTORES, WORKING_DIRECTORY]
    if request.query.get("isdefault") == "true":
        names = names[:1]
    return Reply(200, {"value": [_datastore(cloud, request, name) for name in names]})


@route("POST", ARM, _STORE + "/listSecrets")
def list_datastore_secrets(cloud: Cloud, request: Request) -> Reply:
    """A signature for the account if an expiring secret is requested, else its key."""
    account, store = storage_account(need_workspace(cloud, request)), request.args["store"]
    _datastore(cloud, request, store)
    if not (request.json() if request.body else {}).get("expirableSecret"):
        return Reply(200, {"secretsType": "AccountKey", "key": account_key(cloud, account)})
    # Of the artifact store the SDK signs the addresses of logs itself, with whatever it gets here:
    # with a signature in the place of a key, every line of a log is an error document.
    artifacts = store == "workspaceartifactstore"
    secret = account_key(cloud, account) if artifacts else account_sas(cloud, account)
    return Reply(200, {"secretsType": "Sas", "sasToken": secret})


def _datastore(cloud: Cloud, request: Request, name: str) -> Json:
    workspace = need_workspace(cloud, request)
    if name in DATASTORES:
        place = {"datastoreType": "AzureBlob", "containerName": container_of(workspace, name)}
    elif name == WORKING_DIRECTORY:
        place = {"datastoreType": "AzureFile", "fileShareName": FILE_SHARE}
    else:
        raise AzureError(404, "UserError", f"No datastore named '{name}' was found.")
    properties = {
        **place,
        "accountName": storage_account(workspace),
        "endpoint": "core.windows.net",
        "protocol": "https",
        "isDefault": name == "workspaceblobstore",
        "serviceDataAccessAuthIdentity": "WorkspaceSystemAssignedIdentity",
        "credentials": {"credentialsType": "AccountKey"},
        "tags": {},
    }
    ids = {"id": f"{workspace['id']}/datastores/{name}", "name": name, "type": f"{KIND}/datastores"}
    return {**ids, "properties": properties, "systemData": workspace["systemData"]}


on_get(_STORE, lambda cloud, request: _datastore(cloud, request, request.args["store"]))


def container_of(workspace: Json, store: str) -> str:
    """The container of a datastore."""
    if store not in DATASTORES:
        raise bad(f"No datastore named '{store}' was found.")
    suffix = f"-{workspace['properties']['workspaceId']}" if store == "workspaceblobstore" else ""
    return DATASTORES[store] + suffix


def storage_account(workspace: Json) -> str:
    """The name of the workspace's storage account."""
    return str(workspace["properties"]["storageAccount"]).rsplit("/", 1)[-1]


# --- connections ---

_CONNECTION_KIND = f"{ML}/workspaces/connections"
_CONNECTION = WORKSPACE + "/connections/{name}"
# The credentials that each way of signing in must carry.
_CREDENTIALS: dict[str, set[str]] = {
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
    name, properties = request.args["name"], request.json().get("properties") or {}
    if not _NAME.fullmatch(name):
        raise bad(f"The connection name '{name}' is invalid.", "ValidationError")
    way, credentials = properties.get("authType"), properties.get("credentials") or {}
    if way not in _CREDENTIALS:
        raise bad(f"The authType '{way}' is not supported.", "ValidationError")
    if not properties.get("category") or not properties.get("target"):
        raise bad("The connection needs a category and a target.", "ValidationError")
    missing = _CREDENTIALS[way] - set(credentials)
    if missing:
        raise bad(f"The credentials lack {', '.join(sorted(missing))}.", "ValidationError")
    keys = credentials["keys"] if way == "CustomKeys" else {}
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys.values()):
        raise bad("The custom keys must be strings.", "ValidationError")
    if not all(isinstance(v, str) for v in (properties.get("metadata") or {}).values()):
        raise bad("The connection's metadata must be strings.", "ValidationError")
    # state.json holds no secret in clear text.
    sealed = cloud.seal(properties.pop("credentials", None))
    document = {
        "properties": {**properties, "group": "AzureAI", "createdByWorkspaceArmId": None},
        "systemData": stamps(),
        "_sealed": sealed,
    }
    return Reply(200, public(cloud.put(request.id(_CONNECTION), _CONNECTION_KIND, document)))


@route("GET", ARM, _CONNECTION)
def get_connection(cloud: Cloud, request: Request) -> Reply:
    """One connection, without its secrets."""
    answer = public(_need_connection(cloud, request))
    # As the service does, which is why clients need listsecrets (microsoft/promptflow issue 749).
    if answer["properties"].get("authType") == "CustomKeys":
        answer["properties"]["credentials"] = None
    return Reply(200, answer)


@route("GET", ARM, WORKSPACE + "/connections")
def list_connections(cloud: Cloud, request: Request) -> Reply:
    """All of a workspace; a project has its hub's shared ones as well."""
    workspace = need_workspace(cloud, request)
    docs = cloud.children(workspace["id"], _CONNECTION_KIND)
    hub = workspace["properties"].get("hubResourceId")
    if hub:
        shared = cloud.children(hub, _CONNECTION_KIND)
        docs += [doc for doc in shared if doc["properties"].get("isSharedToAll")]
    category = request.query.get("category")
    chosen = [d for d in docs if not category or d["properties"]["category"] == category]
    return Reply(200, {"value": [public(doc) for doc in chosen]})


@route("POST", ARM, _CONNECTION + "/listsecrets")
def list_connection_secrets(cloud: Cloud, request: Request) -> Reply:
    """One connection with its secrets."""
    connection = _need_connection(cloud, request)
    answer = public(connection)
    answer["properties"]["credentials"] = cloud.unseal(connection["_sealed"])
    return Reply(200, answer)


@route("DELETE", ARM, _CONNECTION)
def delete_connection(cloud: Cloud, request: Request) -> Reply:
    """Delete it."""
    need_workspace(cloud, request)
    return cloud.delete_now(request.id(_CONNECTION))


def _need_connection(cloud: Cloud, request: Request) -> Json:
    workspace, name = need_workspace(cloud, request), request.args["name"]
    connection = cloud.get(request.id(_CONNECTION))
    # A project also has what its hub shares with all projects, and nothing else of it.
    hub = workspace["properties"].get("hubResourceId")
    if connection is None and hub:
        above = cloud.get(f"{hub}/connections/{name}")
        connection = above if above and above["properties"].get("isSharedToAll") else None
    if connection is None:
        raise AzureError(404, "UserError", f"Connection {name} can't be found in this workspace")
    return connection


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
    properties = {
        "flowId": name,
        "flowName": body.get("flowName"),
        "flowType": body.get("flowType") or "default",
        "description": body.get("description"),
        "tags": body.get("tags") or {},
        "flowDefinitionFilePath": path,
        "isArchived": False,
        "createdDate": stamps()["createdAt"],
        "owner": {"userObjectId": CALLER, "userTenantId": TENANT, "userName": "rehearsal"},
    }
    document = {"properties": properties, "systemData": stamps()}
    flow = cloud.put(f"{workspace['id']}/flows/{name}", _FLOW_KIND, document)
    return Reply(200, _flow_answer(flow))


@route("GET", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def get_flow(cloud: Cloud, request: Request) -> Reply:
    """One flow."""
    return Reply(200, _flow_answer(_need_flow(cloud, request)))


@route("PUT", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def update_flow(cloud: Cloud, request: Request) -> Reply:
    """Change name, description or tags; the files of a flow stay."""
    flow, body = _need_flow(cloud, request), request.json()
    for key in ("flowName", "description", "tags", "isArchived"):
        if body.get(key) is not None:
            flow["properties"][key] = body[key]
    return Reply(200, b'""', {"Content-Type": "application/json"})


@route("POST", REGIONAL, "/index/v1.0" + WORKSPACE + "/entities", audience="regional")
def list_entities(cloud: Cloud, request: Request) -> Reply:
    """The flows, newest first, in the form of the index service."""
    workspace = need_workspace(cloud, request)
    names = ("flowName", "description", "tags", "owner", "isArchived", "createdDate")
    entities = []
    for doc in cloud.children(workspace["id"], _FLOW_KIND)[::-1]:
        own = doc["properties"]
        entity = {
            "entityId": f"azureml://location/{workspace['location']}/flows/{own['flowId']}",
            "properties": {k: own[k] for k in ("flowId", "flowType", "flowDefinitionFilePath")},
            "annotations": {k: own[k] for k in names},
        }
        entities.append(entity)
    return Reply(200, {"value": entities, "totalCount": len(entities)})


def _need_flow(cloud: Cloud, request: Request) -> Json:
    workspace, name = need_workspace(cloud, request), request.args["flow"]
    text = f"Flow with id {name} not found"
    return cloud.need(f"{workspace['id']}/flows/{name}", code="UserError", message=text)


def _flow_answer(flow: Json) -> Json:
    workspace = flow["id"].rsplit("/flows/", 1)[0]
    page = f"https://ml.azure.com/prompts/flow/{flow['name']}/details?wsid={workspace}"
    ids = {"flowResourceId": flow["id"], "experimentId": workspace}
    return {**public(flow)["properties"], **ids, "studioPortalEndpoint": page}
