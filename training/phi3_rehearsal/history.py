"""Run history: the details and logs of jobs, as `jobs.stream` and `jobs.download` ask for them."""

from __future__ import annotations

from urllib.parse import quote

from . import jobs
from .cloud import Cloud, route
from .storage import BlobFiles, account_sas
from .wire import ML, REGIONAL, Json, Reply, Request
from .workspaces import container_of, need_workspace, storage_account

_WORKSPACE = f"/subscriptions/{{sub}}/resourceGroups/{{rg}}/providers/{ML}/workspaces/{{ws}}"
_HISTORY = "/history/v1.0" + _WORKSPACE


@route("GET", REGIONAL, _HISTORY + "/runs/{name}/details", audience="regional")
def details(cloud: Cloud, request: Request) -> Reply:
    """Status and the addresses of the logs."""
    job = jobs.need_job(cloud, request)
    properties = job["properties"]
    times = job.get("_times", {})
    body: Json = {
        "runId": job["name"],
        "target": "rehearsal",
        "status": properties["status"],
        "startTimeUtc": times.get("start"),
        "endTimeUtc": times.get("end"),
        "properties": properties.get("properties") or {},
        "logFiles": _logs(cloud, request, job),
        "warnings": [],
    }
    if job.get("_error"):
        body["error"] = {"error": job["_error"]}
    return Reply(200, body)


@route("GET", REGIONAL, _HISTORY + "/runs/{name}", audience="regional")
def get_run(cloud: Cloud, request: Request) -> Reply:
    """The run behind a job."""
    return Reply(200, _run(jobs.need_job(cloud, request)))


@route("GET", REGIONAL, _HISTORY + "/runs/{name}/children", audience="regional")
def children(cloud: Cloud, request: Request) -> Reply:
    """A rehearsed pipeline is one process: it has no children."""
    jobs.need_job(cloud, request)
    return Reply(200, {"value": []})


@route("POST", REGIONAL, _HISTORY + "/rundata", audience="regional")
def run_data(cloud: Cloud, request: Request) -> Reply:
    """A run with its outputs as data assets."""
    request.args["name"] = str(request.json().get("runId"))
    job = jobs.need_job(cloud, request)
    outputs = {
        name: {"assetId": value["uri"], "type": value.get("jobOutputType")}
        for name, value in job["properties"]["outputs"].items()
        if name != "default"
    }
    meta = {**_run(job), "outputs": outputs}
    return Reply(200, {"runMetadata": meta, "runDefinition": None, "jobSpecification": None})


@route(
    "POST",
    REGIONAL,
    "/data/v1.0" + _WORKSPACE + "/dataversion/batchGetResolvedUris",
    audience="regional",
)
def resolve_data(_cloud: Cloud, request: Request) -> Reply:
    """The address behind each data asset: here they are the same."""
    values = request.json().get("values") or []
    resolved = {value: {"uri": value, "type": "uri_folder"} for value in values}
    return Reply(200, {"values": resolved})


@route(
    "POST",
    REGIONAL,
    "/modelregistry/v1.0" + _WORKSPACE + "/models/batchGetResolvedUris",
    audience="regional",
)
def resolve_models(_cloud: Cloud, request: Request) -> Reply:
    """The address behind each model asset: here they are the same."""
    values = request.json().get("values") or []
    return Reply(200, {"values": {v: {"path": v, "modelType": "MLFLOW"} for v in values}})


def _run(job: Json) -> Json:
    properties = job["properties"]
    return {
        "runId": job["name"],
        "rootRunId": job["name"],
        "displayName": properties["displayName"],
        "experimentId": properties["experimentName"],
        "status": properties["status"],
        "tags": properties.get("tags") or {},
        "properties": properties.get("properties") or {},
        "createdUtc": job["systemData"]["createdAt"],
    }


def _logs(cloud: Cloud, request: Request, job: Json) -> dict[str, str]:
    """Each log with a signed address."""
    workspace = need_workspace(cloud, request)
    account = storage_account(workspace)
    container = container_of(workspace, "workspaceartifactstore")
    prefix = f"ExperimentRun/dcid.{job['name']}/"
    names = BlobFiles(cloud.folder, account).names(container, prefix)
    base, sas = f"https://{account}.blob.core.windows.net/{container}", account_sas(cloud, account)
    return {name[len(prefix) :]: f"{base}/{quote(name)}?{sas}" for name in names}
