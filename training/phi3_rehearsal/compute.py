"""Compute clusters, sizes, usages and quotas of a region."""

from __future__ import annotations

import math
import re

from . import offers
from .cloud import Cloud, listed, public, route, stamps
from .jobs import nodes_on
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, bad
from .workspaces import need_workspace

KIND = f"{ML}/workspaces/computes"
_COMPUTE = WORKSPACE + "/computes/{name}"
_LOCATION = f"/subscriptions/{{sub}}/providers/{ML}/locations/{{loc}}"
_QUOTA_SCOPE = _LOCATION + "/providers/Microsoft.Quota"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,30}[A-Za-z0-9]")


@route("PUT", ARM, _COMPUTE)
def put_compute(cloud: Cloud, request: Request) -> Reply:
    """Make or change a cluster."""
    workspace, body = need_workspace(cloud, request), request.json()
    name, given = request.args["name"], body.get("properties") or {}
    inner = given.get("properties") or {}
    if not _NAME.fullmatch(name):
        raise bad(f"The compute name '{name}' is invalid.", "ValidationError")
    if given.get("computeType") != "AmlCompute":
        raise AzureError(501, "NotRehearsed", f"Compute type {given.get('computeType')}")
    found = offers.find_size(str(inner.get("vmSize", "")))
    if found is None:
        raise bad(
            f"The specified VM size '{inner.get('vmSize')}' is not supported in region "
            f"'{workspace['location']}'.",
            "UnsupportedVmSize",
        )
    real, size = found
    scale = inner.get("scaleSettings") or {}
    most, least = int(scale.get("maxNodeCount", 1)), int(scale.get("minNodeCount", 0))
    if least > most or most < 1:
        raise bad("minNodeCount must not be greater than maxNodeCount.", "ValidationError")
    before = cloud.get(request.id(_COMPUTE))
    limit = limit_of(cloud, workspace["location"], size.family)
    if size.cores * most > limit:
        raise bad(
            f"The specified subscription has a {size.family} vCPU quota of {limit} and cannot "
            f"accomodate a cluster of {most} nodes, which needs {size.cores * most} vCPUs.",
            "ClusterCoreQuotaReached",
        )
    properties = {
        **given,
        "provisioningState": "Updating" if before else "Creating",
        "isAttachedCompute": False,
        "createdOn": stamps()["createdAt"],
        "modifiedOn": stamps()["createdAt"],
        "properties": {
            "remoteLoginPortPublicAccess": "NotSpecified",
            **inner,
            "vmSize": real.upper(),
            "currentNodeCount": least,
            "targetNodeCount": least,
            "nodeStateCounts": {"idleNodeCount": least},
            "allocationState": "Steady",
            "allocationStateTransitionTime": stamps()["createdAt"],
        },
    }
    document = {
        "location": workspace["location"],
        "identity": body.get("identity"),
        "tags": body.get("tags") or {},
        "properties": properties,
    }
    made = cloud.put(request.id(_COMPUTE), KIND, document)
    return cloud.accepted(made, cloud.operate(made), 200 if before else 201)


@route("GET", ARM, _COMPUTE)
def get_compute(cloud: Cloud, request: Request) -> Reply:
    """One cluster."""
    return Reply(200, _shown(cloud, _need(cloud, request)))


@route("POST", ARM, _COMPUTE + "/listNodes")
def list_nodes(cloud: Cloud, request: Request) -> Reply:
    """The nodes that jobs run on now; idle ones are gone at once here."""
    found = _need(cloud, request)
    nodes = [
        {"nodeId": f"tvm-{index}", "privateIpAddress": f"10.0.0.{4 + index}", "port": 50000 + index}
        | {"nodeState": "running", "runId": name}
        for index, name in enumerate(nodes_on(cloud, found["id"]))
    ]
    return Reply(200, {"nodes": nodes})


def _shown(cloud: Cloud, cluster: Json) -> Json:
    """The cluster with as many nodes as its jobs need now."""
    shown = public(cluster)
    inner = shown["properties"]["properties"]
    least = int((inner.get("scaleSettings") or {}).get("minNodeCount", 0))
    busy = len(nodes_on(cloud, cluster["id"]))
    inner["currentNodeCount"] = inner["targetNodeCount"] = max(busy, least)
    inner["nodeStateCounts"] = {
        "runningNodeCount": busy,
        "idleNodeCount": max(least - busy, 0),
        "preparingNodeCount": 0,
        "unusableNodeCount": 0,
        "leavingNodeCount": 0,
        "preemptedNodeCount": 0,
    }
    return shown


@route("PATCH", ARM, _COMPUTE)
def patch_compute(cloud: Cloud, request: Request) -> Reply:
    """Change the scale of a cluster."""
    found = _need(cloud, request)
    changed = (request.json().get("properties") or {}).get("properties") or {}
    found["properties"]["properties"].update(changed)
    return Reply(200, public(found))


@route("GET", ARM, WORKSPACE + "/computes")
def list_computes(cloud: Cloud, request: Request) -> Reply:
    """All clusters of a workspace."""
    found = cloud.children(need_workspace(cloud, request)["id"], KIND)
    return listed(found, lambda cluster: _shown(cloud, cluster))


@route("DELETE", ARM, _COMPUTE)
def delete_compute(cloud: Cloud, request: Request) -> Reply:
    """Delete a cluster that no job runs on."""
    need_workspace(cloud, request)
    found = cloud.get(request.id(_COMPUTE))
    if found is None:
        return Reply(204)
    busy = nodes_on(cloud, found["id"])
    if busy:
        raise AzureError(
            409,
            "Conflict",
            f"The compute '{found['name']}' cannot be deleted: the job '{busy[0]}' runs on it.",
        )
    found["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(found, cloud.operate(found, kind="delete"), 202, body=False)


def _need(cloud: Cloud, request: Request) -> Json:
    need_workspace(cloud, request)
    found = cloud.get(request.id(_COMPUTE))
    if found is None:
        name = request.args["name"]
        raise AzureError(
            404, "ResourceNotFound", f"Compute with name '{name}' was not found in the workspace."
        )
    return found


@route("GET", ARM, _LOCATION + "/vmSizes")
def list_sizes(_cloud: Cloud, _request: Request) -> Reply:
    """The sizes of a region."""
    return Reply(
        200,
        {
            "value": [
                {
                    "name": name,
                    "family": size.family,
                    "vCPUs": size.cores,
                    "gpus": size.gpus,
                    "osVhdSizeMB": 1047552,
                    "maxResourceVolumeMB": 65536,
                    "memoryGB": size.memory_gb,
                    "lowPriorityCapable": True,
                    "premiumIO": True,
                    "supportedComputeTypes": ["AmlCompute", "ComputeInstance"],
                }
                for name, size in offers.SIZES.items()
            ]
        },
    )


@route("GET", ARM, _LOCATION + "/usages")
def list_usages(cloud: Cloud, request: Request) -> Reply:
    """Cores in use and their limits."""
    return Reply(200, {"value": [_usage(cloud, request, family) for family in _families()]})


@route("GET", ARM, _LOCATION + "/quotas")
def list_workspace_quotas(cloud: Cloud, request: Request) -> Reply:
    """The limits alone."""
    return Reply(
        200,
        {
            "value": [
                {
                    "id": request.id(_LOCATION + "/quotas/{family}", family=family),
                    "type": f"{ML}/quotas",
                    "limit": limit_of(cloud, request.args["loc"], family),
                    "unit": "Count",
                    "name": {"value": family, "localizedValue": family},
                }
                for family in _families()
            ]
        },
    )


@route("GET", ARM, _QUOTA_SCOPE + "/quotas")
def list_quotas(cloud: Cloud, request: Request) -> Reply:
    """The limits, as Microsoft.Quota tells them."""
    return Reply(200, {"value": [_quota(cloud, request, family) for family in _families()]})


@route("GET", ARM, _QUOTA_SCOPE + "/quotas/{family}")
def get_quota(cloud: Cloud, request: Request) -> Reply:
    """One limit."""
    return Reply(200, _quota(cloud, request, _family(request.args["family"])))


@route("PUT", ARM, _QUOTA_SCOPE + "/quotas/{family}")
def put_quota(cloud: Cloud, request: Request) -> Reply:
    """Ask for a limit; up to 400 cores are granted, more goes to support."""
    family, location = _family(request.args["family"]), request.args["loc"]
    wanted = ((request.json().get("properties") or {}).get("limit") or {}).get("value")
    if not isinstance(wanted, int) or wanted < 0:
        raise bad("The limit value is invalid.", "InvalidQuotaLimit")
    if wanted > 400:
        raise bad(
            f"The quota request for {family} cannot be granted automatically; "
            "open a support request.",
            "ContactSupport",
        )
    cloud.quota[f"{location.lower()}/{family.lower()}"] = wanted
    return Reply(200, _quota(cloud, request, family))


@route("GET", ARM, _QUOTA_SCOPE + "/usages")
def list_quota_usages(cloud: Cloud, request: Request) -> Reply:
    """Cores in use, as Microsoft.Quota tells them."""
    found = []
    for family in _families():
        usage = _usage(cloud, request, family)
        properties = {"usages": {"value": usage["currentValue"]}, "name": usage["name"]}
        found.append({"id": usage["id"], "name": family, "properties": properties})
    return Reply(200, {"value": found})


def _usage(cloud: Cloud, request: Request, family: str) -> Json:
    location = request.args["loc"]
    return {
        "id": request.id(_LOCATION + "/usages/{family}", family=family),
        "amlWorkspaceLocation": location,
        "type": f"{ML}/usages",
        "unit": "Count",
        "currentValue": used(cloud, location, family),
        "limit": limit_of(cloud, location, family),
        "name": {"value": family, "localizedValue": f"{family} Cluster Dedicated vCPUs"},
    }


def _quota(cloud: Cloud, request: Request, family: str) -> Json:
    limit = limit_of(cloud, request.args["loc"], family)
    return {
        "id": request.id(_QUOTA_SCOPE + "/quotas/{family}", family=family),
        "name": family,
        "type": "Microsoft.Quota/quotas",
        "properties": {
            "limit": {"limitObjectType": "LimitValue", "limitType": "Independent", "value": limit},
            "name": {"value": family, "localizedValue": family},
            "unit": "Count",
            "isQuotaApplicable": True,
            "provisioningState": "Succeeded",
        },
    }


def _families() -> list[str]:
    return list(dict.fromkeys(size.family for size in offers.SIZES.values()))


def _family(name: str) -> str:
    for family in _families():
        if family.lower().replace(" ", "") == name.lower().replace(" ", ""):
            return family
    raise AzureError(404, "ResourceNotFound", f"The quota '{name}' was not found.")


def limit_of(cloud: Cloud, location: str, family: str) -> int:
    """The cores of a family that may be used in a region."""
    default = offers.FAMILY_QUOTA.get(family, offers.DEFAULT_QUOTA)
    return cloud.quota.get(f"{location.lower()}/{family.lower()}", default)


def used(cloud: Cloud, location: str, family: str) -> int:
    """The cores of a family in use: nodes that jobs run on, and deployments."""
    total = 0
    for doc in cloud.children("/subscriptions"):
        if doc.get("location") != location:
            continue
        if doc["type"].endswith("/onlineEndpoints/deployments"):
            size = offers.find_size(doc["properties"].get("instanceType") or "")
            if size and size[1].family == family:
                total += deployment_cores(size[1], doc["sku"]["capacity"])
        if doc["type"] == KIND:
            size = offers.find_size(doc["properties"]["properties"]["vmSize"])
            if size and size[1].family == family:
                total += size[1].cores * len(nodes_on(cloud, doc["id"]))
    return total


def deployment_cores(size: offers.Size, instances: int) -> int:
    """The quota that a deployment takes: a fifth more instances, except on some sizes."""
    return size.cores * (math.ceil(instances * 1.2) if size.reserve else instances)
