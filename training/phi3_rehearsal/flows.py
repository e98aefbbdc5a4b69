"""Prompt flow's service: flows that lie in the workspace's file share, and its index of them."""

from __future__ import annotations

import uuid

import yaml

from .cloud import CALLER, TENANT, Cloud, public, route, stamps
from .shares import share_file
from .wire import ML, REGIONAL, AzureError, Json, Reply, Request, bad
from .workspaces import FILE_SHARE, need_workspace, storage_account

KIND = f"{ML}/workspaces/flows"
_WORKSPACE = f"/subscriptions/{{sub}}/resourceGroups/{{rg}}/providers/{ML}/workspaces/{{ws}}"
_FLOWS = "/flow/api" + _WORKSPACE + "/Flows"


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
    return Reply(200, _shown(cloud.put(f"{workspace['id']}/flows/{name}", KIND, document)))


@route("GET", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def get_flow(cloud: Cloud, request: Request) -> Reply:
    """One flow."""
    return Reply(200, _shown(_need(cloud, request)))


@route("PUT", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def update_flow(cloud: Cloud, request: Request) -> Reply:
    """Change name, description or tags; the files of a flow stay."""
    found, body = _need(cloud, request), request.json()
    for key in ("flowName", "description", "tags", "isArchived"):
        if body.get(key) is not None:
            found["properties"][key] = body[key]
    return Reply(200, b'""', {"Content-Type": "application/json"})


@route("DELETE", REGIONAL, _FLOWS + "/{flow}", audience="regional")
def delete_flow(cloud: Cloud, request: Request) -> Reply:
    """Forget a flow; its files stay in the share."""
    cloud.delete(_need(cloud, request)["id"])
    return Reply(200)


@route("POST", REGIONAL, "/index/v1.0" + _WORKSPACE + "/entities", audience="regional")
def list_entities(cloud: Cloud, request: Request) -> Reply:
    """The flows, newest first, as the index service tells them."""
    workspace = need_workspace(cloud, request)
    docs = cloud.children(workspace["id"], KIND)[::-1]
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


def _need(cloud: Cloud, request: Request) -> Json:
    workspace = need_workspace(cloud, request)
    found = cloud.get(f"{workspace['id']}/flows/{request.args['flow']}")
    if found is None:
        name = request.args["flow"]
        raise AzureError(404, "UserError", f"Flow with id {name} not found")
    return found


def _shown(doc: Json) -> Json:
    properties: Json = public(doc)["properties"]
    workspace = doc["id"].rsplit("/flows/", 1)[0]
    page = f"https://ml.azure.com/prompts/flow/{properties['flowId']}/details?wsid={workspace}"
    return {
        **properties,
        "flowResourceId": doc["id"],
        "studioPortalEndpoint": page,
        "experimentId": workspace,
    }
