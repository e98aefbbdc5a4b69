"""Compute clusters, sizes, usages and quotas of a region."""

from __future__ import annotations

import math
import re

from . import offers
from .cloud import Cloud, listed, now, public, route
from .jobs import die_with, nodes_of_ended_jobs, nodes_on
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, bad
from .workspaces import need_workspace

KIND = f"{ML}/workspaces/computes"
DEPLOYMENT_KIND = f"{ML}/workspaces/onlineEndpoints/deployments"
_COMPUTE = WORKSPACE + "/computes/{name}"
_LOCATION = f"/subscriptions/{{sub}}/providers/{ML}/locations/{{loc}}"
_QUOTA_SCOPE = _LOCATION + "/providers/Microsoft.Quota"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,30}[A-Za-z0-9]")
# A duration as ISO 8601 has it and the SDK writes it, up to a day.
_DURATION = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?")
_DEFAULT_IDLE = "PT120S"  # "CLI (v2) compute cluster (AmlCompute) YAML schema"


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
    match, region = offers.find_size(str(inner.get("vmSize", ""))), workspace["location"]
    if match is None:
        text = f"The specified VM size '{inner.get('vmSize')}' is not supported in region "
        raise bad(text + f"'{region}'.", "UnsupportedVmSize")
    real, size = match
    scale = inner.get("scaleSettings") or {}
    most, least = int(scale.get("maxNodeCount", 1)), int(scale.get("minNodeCount", 0))
    if least > most or most < 1:
        raise bad("minNodeCount must not be greater than maxNodeCount.", "ValidationError")
    before = cloud.get(request.id(_COMPUTE))
    limit = limit_of(cloud, region, size.family)
    if size.cores * most > limit:
        text = f"The specified subscription has a {size.family} vCPU quota of {limit} and cannot "
        text += f"accomodate a cluster of {most} nodes, which needs {size.cores * most} vCPUs."
        raise bad(text, "ClusterCoreQuotaReached")
    made_at = now()
    properties = {
        **given,
        "provisioningState": "Updating" if before else "Creating",
        "isAttachedCompute": False,
        "createdOn": made_at,
        "modifiedOn": made_at,
        "properties": {
            "remoteLoginPortPublicAccess": "NotSpecified",
            **inner,
            "vmSize": real.upper(),  # so Azure Machine Learning answers it, however it was asked
            "allocationState": "Steady",
            "allocationStateTransitionTime": made_at,
        },
    }
    document = {
        "location": region,
        "identity": body.get("identity"),
        "tags": body.get("tags") or {},
        "properties": properties,
    }
    cluster = cloud.put(request.id(_COMPUTE), KIND, document)
    return cloud.accepted(cluster, cloud.operate(cluster), 200 if before else 201)


@route("GET", ARM, _COMPUTE)
def get_compute(cloud: Cloud, request: Request) -> Reply:
    """One cluster."""
    return Reply(200, _with_nodes(cloud, _need(cloud, request)))


@route("POST", ARM, _COMPUTE + "/listNodes")
def list_nodes(cloud: Cloud, request: Request) -> Reply:
    """The nodes that there are now, idle ones among them."""
    cluster = _need(cloud, request)
    busy = nodes_on(cloud, cluster["id"])
    jobs = [*busy, *[None] * _idle_nodes(cloud, cluster)]
    nodes = [
        {"nodeId": f"tvm-{index}", "privateIpAddress": f"10.0.0.{4 + index}", "port": 50000 + index}
        | ({"nodeState": "running", "runId": name} if name else {"nodeState": "idle"})
        for index, name in enumerate(jobs)
    ]
    return Reply(200, {"nodes": nodes})


def _idle_nodes(cloud: Cloud, cluster: Json) -> int:
    """Nodes without a job that have not been released yet: they bill, and hold their cores."""
    scale = cluster["properties"]["properties"].get("scaleSettings") or {}
    idle = str(scale.get("nodeIdleTimeBeforeScaleDown") or _DEFAULT_IDLE)
    match = _DURATION.fullmatch(idle)
    if match is None:
        raise bad(f"nodeIdleTimeBeforeScaleDown '{idle}' is not a duration.", "ValidationError")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    kept = ((24 * days + hours) * 60 + minutes) * 60 + seconds
    # Idle nodes are not tracked one by one: as many as the largest job that ended lately.
    lately = nodes_of_ended_jobs(cloud, cluster["id"], kept)
    busy, least = len(nodes_on(cloud, cluster["id"])), int(scale.get("minNodeCount", 0))
    return max(0, max(lately, least) - busy)


def _with_nodes(cloud: Cloud, cluster: Json) -> Json:
    """The cluster with its nodes now."""
    answer = public(cluster)
    inner = answer["properties"]["properties"]
    busy, idle = len(nodes_on(cloud, cluster["id"])), _idle_nodes(cloud, cluster)
    inner["currentNodeCount"] = inner["targetNodeCount"] = busy + idle
    others = ("preparingNodeCount", "unusableNodeCount", "leavingNodeCount", "preemptedNodeCount")
    counts = {"runningNodeCount": busy, "idleNodeCount": idle}
    inner["nodeStateCounts"] = counts | dict.fromkeys(others, 0)
    return answer


@route("GET", ARM, WORKSPACE + "/computes")
def list_computes(cloud: Cloud, request: Request) -> Reply:
    """All clusters of a workspace."""
    clusters = cloud.children(need_workspace(cloud, request)["id"], KIND)
    return listed(clusters, lambda cluster: _with_nodes(cloud, cluster))


@route("DELETE", ARM, _COMPUTE)
def delete_compute(cloud: Cloud, request: Request) -> Reply:
    """Delete a cluster, and the jobs that run on it with it."""
    need_workspace(cloud, request)
    cluster = cloud.get(request.id(_COMPUTE))
    if cluster is None:
        return Reply(204)
    die_with(cloud, cluster["id"])
    cluster["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(cluster, cloud.operate(cluster, kind="delete"), 202, body=False)


def _need(cloud: Cloud, request: Request) -> Json:
    need_workspace(cloud, request)
    text = f"Compute with name '{request.args['name']}' was not found in the workspace."
    return cloud.need(request.id(_COMPUTE), message=text)


@route("GET", ARM, _LOCATION + "/vmSizes")
def list_sizes(_cloud: Cloud, _request: Request) -> Reply:
    """The sizes of a region."""
    same = {
        "osVhdSizeMB": 1047552,
        "maxResourceVolumeMB": 65536,
        "lowPriorityCapable": True,
        "premiumIO": True,
        "supportedComputeTypes": ["AmlCompute", "ComputeInstance"],
    }
    # In the wire's spelling: azure-ai-ml 1.35 leaves its own v_cp_us and memory_gb empty.
    sizes = [
        {"name": name, "family": s.family, "vCPUs": s.cores, "gpus": s.gpus}
        | {"memoryGB": s.memory_gb, **same}
        for name, s in offers.SIZES.items()
    ]
    return Reply(200, {"value": sizes})


# --- quota, in cores of each family: as Azure Machine Learning tells it, and as Microsoft.Quota ---


@route("GET", ARM, _LOCATION + "/usages")
def list_usages(cloud: Cloud, request: Request) -> Reply:
    """Cores in use and their limits."""
    region = request.args["loc"]
    usages = [
        {
            "id": request.id(_LOCATION + "/usages/{family}", family=family),
            "amlWorkspaceLocation": region,
            "type": f"{ML}/usages",
            "unit": "Count",
            "currentValue": used(cloud, region, family),
            "limit": limit_of(cloud, region, family),
            "name": {"value": family, "localizedValue": f"{family} Cluster Dedicated vCPUs"},
        }
        for family in _families()
    ]
    return Reply(200, {"value": usages})


@route("GET", ARM, _QUOTA_SCOPE + "/quotas/{family}")
def get_quota(cloud: Cloud, request: Request) -> Reply:
    """One limit."""
    return Reply(200, _quota(cloud, request, _family(request.args["family"])))


@route("PUT", ARM, _QUOTA_SCOPE + "/quotas/{family}")
def put_quota(cloud: Cloud, request: Request) -> Reply:
    """Ask for a limit."""
    family, location = _family(request.args["family"]), request.args["loc"]
    wanted = ((request.json().get("properties") or {}).get("limit") or {}).get("value")
    if not isinstance(wanted, int) or wanted < 0:
        raise bad("The limit value is invalid.", "InvalidQuotaLimit")
    # So that both answers can be rehearsed; on Azure a request for GPUs mostly goes to support.
    if wanted > 400:
        text = f"The quota request for {family} cannot be granted automatically; "
        raise bad(text + "open a support request.", "ContactSupport")
    cloud.quota[f"{location.lower()}/{family.lower()}"] = wanted
    return Reply(200, _quota(cloud, request, family))


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
    """The family in Azure's spelling: callers differ in case and spaces."""
    for family in _families():
        if family.lower().replace(" ", "") == name.lower().replace(" ", ""):
            return family
    raise AzureError(404, "ResourceNotFound", f"The quota '{name}' was not found.")


def limit_of(cloud: Cloud, location: str, family: str) -> int:
    """The cores of a family that may be used in a region."""
    default = offers.FAMILY_QUOTA.get(family, offers.DEFAULT_QUOTA)
    return cloud.quota.get(f"{location.lower()}/{family.lower()}", default)


def used(cloud: Cloud, location: str, family: str) -> int:
    """The cores of a family in use: by nodes, idle or not, and by deployments."""
    total = 0
    for doc in cloud.children("/subscriptions"):
        if doc.get("location") != location or doc["type"] not in (KIND, DEPLOYMENT_KIND):
            continue
        inner = doc["properties"]
        name = inner["properties"]["vmSize"] if doc["type"] == KIND else inner.get("instanceType")
        size = offers.find_size(name or "")
        if size is None or size[1].family != family:
            continue
        if doc["type"] == KIND:
            nodes = len(nodes_on(cloud, doc["id"])) + _idle_nodes(cloud, doc)
            total += size[1].cores * nodes
        else:
            total += deployment_cores(size[1], doc["sku"]["capacity"])
    return total


def deployment_cores(size: offers.Size, instances: int) -> int:
    """The quota that a deployment takes."""
    # 20 % more instances for upgrades, rounded up ("Manage and increase quotas"), except on some
    # sizes.
    return size.cores * (math.ceil(instances * 1.2) if size.reserve else instances)
