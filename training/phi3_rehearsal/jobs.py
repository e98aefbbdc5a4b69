"""Jobs of a workspace: checked as Azure checks them, run for real in a process of their own, and
shown by run history, where `jobs.stream` and `jobs.download` look.

Writes jobs/<name>/ in the rehearsal's folder: job.json for the process, status.json from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import re
import subprocess
import uuid
from urllib.parse import quote

import psutil

from . import assets, offers
from .cloud import ACTIVE, Cloud, listed, now, on_get, public, route, stamps
from .identity import AUDIENCES, claims_of
from .job_process import JobInput, JobPlan
from .processes import ProcessId, spawn, write_atomically
from .storage import BlobFiles, account_sas
from .wire import ARM, ML, REGIONAL, WORKSPACE, AzureError, Json, Reply, Request, asset_id, bad
from .workspaces import container_of, need_workspace, storage_account

KIND = f"{ML}/workspaces/jobs"
_JOB = WORKSPACE + "/jobs/{name}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,254}")

# Children are remembered so that their end can be collected; otherwise they stay as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


@route("PUT", ARM, _JOB)
def put_job(cloud: Cloud, request: Request) -> Reply:
    """Submit a job; a name that exists already is answered with the job it names."""
    workspace, body = need_workspace(cloud, request), request.json()
    name, given = request.args["name"], body.get("properties") or {}
    before = cloud.get(request.id(_JOB))
    # The SDK makes the name up and repeats the call when an answer is lost: that must start
    # nothing.
    if before is not None:
        for key in ("tags", "displayName", "description"):
            if given.get(key) is not None:
                before["properties"][key] = given[key]
        return Reply(200, public(refreshed(cloud, before)))
    if not _NAME.fullmatch(name):
        raise bad(f"Job name '{name}' is invalid.", "ValidationError")
    kind = str(given.get("jobType"))
    if kind == "Command":
        plan = _command_plan(cloud, workspace, given)
    elif kind == "Pipeline":
        # A pipeline acts for the user, whose token for the data plane must come along.
        token = claims_of(cloud, request.headers.get("x-azureml-token", ""))
        if token is None or token["aud"].rstrip("/") not in AUDIENCES["ml"]:
            text = "The token in x-azureml-token is missing or invalid."
            raise AzureError(401, "UserError", text)
        plan = _pipeline_plan(cloud, workspace, given)
    else:
        raise AzureError(501, "NotRehearsed", f"Jobs of type {kind} are not rehearsed")
    job = cloud.put(request.id(_JOB), KIND, _job_document(workspace, name, given))
    # Write job.json and start the process that carries the job out.
    folder = cloud.folder / "jobs" / job["name"]
    folder.mkdir(parents=True, exist_ok=True)
    files = BlobFiles(cloud.folder, storage_account(workspace))
    artifacts = files.data / container_of(workspace, "workspaceartifactstore")
    plan.name, plan.workspace = job["name"], workspace["id"]
    plan.experiment = job["properties"]["experimentName"]
    plan.outputs = {
        output: str(assets.locate(cloud, workspace, value["uri"]))
        for output, value in job["properties"]["outputs"].items()
        if output != "default"
    }
    plan.artifacts = str(artifacts / "ExperimentRun" / f"dcid.{job['name']}")
    plan.catalogue = str(assets.catalogue(cloud))
    # Injected faults count down here, so that a job that is submitted again meets the next one.
    plan.slow_seconds = cloud.faults.slowness(job["id"], "job")
    plan.failure = cloud.faults.failure(job["id"], "job")
    plan.write(folder / "job.json")
    process = spawn("phi3_rehearsal", "job", str(folder), log=folder / "process.log")
    _children[process.pid] = process
    job["_process"] = dataclasses.asdict(ProcessId.of(process.pid))
    return Reply(201, public(job))


def refreshed(cloud: Cloud, job: Json) -> Json:
    """The job with the status that its process has written."""
    properties = job["properties"]
    if properties["status"] not in ACTIVE:
        return job
    written = _status_of(cloud, job)
    # One that was killed has not written how it ended.
    if written["status"] in ACTIVE and _process_of(job) is None:
        written = _status_of(cloud, job)  # it may have ended between the two looks
        if written["status"] in ACTIVE:
            message = "The node went away while the job ran."
            written = {"status": "Failed", "error": {"code": "SystemError", "message": message}}
    properties["status"] = written["status"]
    job["_times"] = {k: written[k] for k in ("start", "end") if k in written}
    if written.get("error"):
        job["_error"] = written["error"]
    return job


def _status_of(cloud: Cloud, job: Json) -> Json:
    file = cloud.folder / "jobs" / job["name"] / "status.json"
    text = file.read_text(encoding="utf-8") if file.is_file() else "{}"
    return {"status": "NotStarted", **json.loads(text)}


def _process_of(job: Json) -> psutil.Process | None:
    """The process of the job, while it lives."""
    saved = job.get("_process")
    if saved is None:
        return None
    child = _children.get(saved["pid"])
    if child is not None and child.poll() is not None:
        return None
    return ProcessId(saved["pid"], saved["create_time"]).find()


def cancel(cloud: Cloud, job: Json, error: Json | None = None) -> None:
    """End the job's process, and all that it started; with an error it has failed."""
    if refreshed(cloud, job)["properties"]["status"] not in ACTIVE:
        return
    process = _process_of(job)
    if process is not None:
        # Its ranks and the workers that they forked would outlive it.
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(10)
    job["properties"]["status"] = status = "Failed" if error else "Canceled"
    job.setdefault("_times", {})["end"] = now()
    if error:
        job["_error"] = error
    file = cloud.folder / "jobs" / job["name"] / "status.json"
    write_atomically(file, json.dumps({"status": status, **job["_times"]}))


@route("GET", ARM, WORKSPACE + "/jobs")
def list_jobs(cloud: Cloud, request: Request) -> Reply:
    """All jobs, newest first."""
    docs = cloud.children(need_workspace(cloud, request)["id"], KIND)[::-1]
    view = request.query.get("listviewtype", "ActiveOnly").lower()
    archived = view == "archivedonly"
    docs = [d for d in docs if view == "all" or d["properties"]["isArchived"] == archived]
    return listed([refreshed(cloud, job) for job in docs])


@route("POST", ARM, _JOB + "/cancel")
def cancel_job(cloud: Cloud, request: Request) -> Reply:
    """Cancel a job; one that has ended stays as it is."""
    cancel(cloud, need_job(cloud, request))
    return Reply(200)


def need_job(cloud: Cloud, request: Request) -> Json:
    """The job that the request names, up to date. Raises AzureError (404)."""
    need_workspace(cloud, request)
    text = f"Run {request.args['name']} could not be found"
    return refreshed(cloud, cloud.need(request.id(_JOB), code="UserError", message=text))


on_get(_JOB, need_job)


def die_with(cloud: Cloud, compute_id: str) -> None:
    """End the jobs of a cluster that is being deleted: Azure takes their nodes away."""
    error = {"code": "ComputeDeleted", "message": "The compute target of the job was deleted."}
    for job in _jobs_on(cloud, compute_id):
        cancel(cloud, job, error)


def nodes_on(cloud: Cloud, compute_id: str) -> list[str]:
    """For each node of a cluster that is in use, the name of the job that runs on it."""
    busy = []
    for job in _jobs_on(cloud, compute_id):
        if job["properties"]["status"] in ACTIVE:
            busy += [str(job["name"])] * _nodes_asked(job)
    return busy


def nodes_of_ended_jobs(cloud: Cloud, compute_id: str, seconds: float) -> int:
    """The most nodes that one job had which ended on the cluster less than `seconds` ago."""
    nodes = 0
    for job in _jobs_on(cloud, compute_id):
        ended = str((job.get("_times") or {}).get("end") or "").replace("Z", "+00:00")
        if ended and cloud.time() - dt.datetime.fromisoformat(ended).timestamp() < seconds:
            nodes = max(nodes, _nodes_asked(job))
    return nodes


def _jobs_on(cloud: Cloud, compute_id: str) -> list[Json]:
    """The jobs of a cluster, ended or not, up to date."""
    name = compute_id.rsplit("/", 1)[-1].lower()
    found = []
    for job in cloud.children(compute_id.rsplit("/computes/", 1)[0], KIND):
        text = json.dumps(job["properties"]).lower()
        # A command job names the cluster's id, a pipeline its name as an input.
        if compute_id.lower() in text or f'"value": "{name}"' in text:
            found.append(refreshed(cloud, job))
    return found


def _nodes_asked(job: Json) -> int:
    return int((job["properties"].get("resources") or {}).get("instanceCount") or 1)


# --- what Azure checks when a job is submitted ---

_LITERAL, _PARENT = "literal", re.compile(r"\$\{\{parent\.(inputs|outputs)\.([\w-]+)\}\}")


def _job_document(workspace: Json, name: str, given: Json) -> Json:
    """The job as it is answered: every output has an address, the studio a page."""
    store = f"azureml://datastores/workspaceblobstore/paths/azureml/{name}"
    artifacts = f"azureml://datastores/workspaceartifactstore/ExperimentRun/dcid.{name}"
    outputs: Json = {
        output: {**(value or {}), "uri": (value or {}).get("uri") or f"{store}/{output}/"}
        for output, value in (given.get("outputs") or {}).items()
    }
    if given["jobType"] == "Command":
        outputs["default"] = {"jobOutputType": "uri_folder", "uri": artifacts}
    page = f"https://ml.azure.com/runs/{name}?wsid={workspace['id']}"
    addresses = {"Studio": page, "Tracking": workspace["properties"]["mlFlowTrackingUri"]}
    properties = {
        **given,
        "experimentName": given.get("experimentName") or "Default",
        "displayName": given.get("displayName") or name,
        "outputs": outputs,
        "services": {k: {"jobServiceType": k, "endpoint": url} for k, url in addresses.items()},
        "status": "NotStarted",
        "isArchived": False,
        "properties": {**(given.get("properties") or {}), "ContentSnapshotId": str(uuid.uuid4())},
    }
    return {"properties": properties, "systemData": stamps(), "_artifacts": artifacts}


def _command_plan(cloud: Cloud, workspace: Json, given: Json) -> JobPlan:
    """What the process of a command job needs, after Azure's checks."""
    size = _size_of(cloud, given)
    command = str(given.get("command") or "")
    inputs, outputs = given.get("inputs") or {}, given.get("outputs") or {}
    for part, names in (("inputs", inputs), ("outputs", outputs)):
        for used in re.findall(rf"\$\{{\{{{part}\.([\w-]+)\}}\}}", command):
            if used not in names:
                raise bad(f"The command refers to {part}.{used}, which the job does not define.")
    if not given.get("environmentId"):
        raise bad("A command job needs an environment.", "ValidationError")
    code = given.get("codeId")
    place = None
    if code:
        doc = cloud.get(asset_id(code))
        if doc is None:
            raise bad(f"The code '{code}' was not found.")
        place = str(assets.locate(cloud, workspace, doc["properties"]["codeUri"]))
    distribution = given.get("distribution") or {}
    nodes = int((given.get("resources") or {}).get("instanceCount") or 1)
    each = int(distribution.get("processCountPerInstance") or 1)
    if distribution and size and size.gpus and each > size.gpus:
        raise bad(f"{each} processes are requested on a node with {size.gpus} GPUs.")
    return JobPlan(
        inputs={name: _input(cloud, workspace, name, value) for name, value in inputs.items()},
        command=command,
        code=place,
        environment=given.get("environmentVariables") or {},
        nodes=nodes if distribution else 1,
        processes=each,
    )


def _size_of(cloud: Cloud, given: Json) -> offers.Size | None:
    """The machine of a job, if its cluster exists and has enough nodes. Raises AzureError."""
    cluster_id, resources = given.get("computeId"), given.get("resources") or {}
    nodes = int(resources.get("instanceCount") or 1)
    if cluster_id:
        cluster = cloud.get(str(cluster_id))
        if cluster is None:
            name = str(cluster_id).rsplit("/", 1)[-1]
            raise bad(f"The compute target '{name}' was not found in the workspace.")
        inner = cluster["properties"]["properties"]
        most = int((inner.get("scaleSettings") or {}).get("maxNodeCount", 1))
        if nodes > most:
            raise bad(f"The job needs {nodes} nodes; the cluster '{cluster['name']}' has {most}.")
        size = offers.find_size(inner["vmSize"])
        return size[1] if size else None
    size = offers.find_size(str(resources.get("instanceType") or ""))
    if size is None:
        raise bad("A job without a compute target needs resources.instance_type.")
    return size[1]


def _input(cloud: Cloud, workspace: Json, name: str, value: Json) -> JobInput:
    """An input as a literal or as the folder or file it is in. Raises AzureError."""
    if value.get("jobInputType") == _LITERAL:
        return JobInput(literal=str(value.get("value")))
    uri = str(value.get("uri") or "")
    catalogue = assets.catalogue_folder(cloud, uri)
    if catalogue is not None:
        return JobInput(path=str(catalogue))
    asset = (cloud.get(asset_id(uri)) or {"properties": {}})["properties"]
    place = assets.locate(
        cloud, workspace, str(asset.get("modelUri") or asset.get("dataUri") or uri)
    )
    if not place.exists():
        raise bad(f"The input '{name}' has no data at '{uri}'.")
    return JobInput(path=str(place))


def _pipeline_plan(cloud: Cloud, workspace: Json, given: Json) -> JobPlan:
    """What the process of a pipeline job needs, after a look at every input."""
    nodes = given.get("jobs") or {}
    if len(nodes) != 1:
        raise AzureError(501, "NotRehearsed", "Only pipelines of one component are rehearsed")
    ((_name, node),) = nodes.items()
    asked = str(node.get("componentId") or node.get("component") or "")
    known = f"registries/azureml/components/{offers.COMPONENT}/versions/{offers.COMPONENT_VERSION}"
    if not asked.endswith(known):
        raise bad(f"The component '{asked}' was not found.")
    # A node's input that is bound to an input of the pipeline is replaced by that.
    parent, values = given.get("inputs") or {}, dict[str, Json]()
    for name, value in (node.get("inputs") or {}).items():
        to = _PARENT.fullmatch(str(value.get("value", "")))
        if to is None:
            kind = value.get("job_input_type") or value.get("jobInputType")
            own = {"jobInputType": kind, "value": value.get("value"), "uri": value.get("uri")}
            values[name] = own
        elif to.group(2) in parent:
            values[name] = parent[to.group(2)]
        else:
            raise bad(f"The pipeline has no input '{to.group(2)}'.")
    # What the component would refuse: unknown inputs, wrong types, no model, no data.
    faults = []
    for name, value in values.items():
        item = offers.INPUTS.get(name)
        if item is None:
            faults.append(f"Unknown input '{name}' of {offers.COMPONENT}")
        elif item.is_literal != (value.get("jobInputType") == _LITERAL):
            faults.append(f"Input '{name}' must be of type {item.kind}")
        elif not item.is_literal and value["jobInputType"] != item.kind:
            faults.append(f"Input '{name}' is {value['jobInputType']}, expected {item.kind}")
        elif item.is_literal and (fault := item.fault(value.get("value"))):
            faults.append(f"Input '{name}': {fault}")
    for needed in (
        ("mlflow_model_path", "pytorch_model_path", "huggingface_id"),
        ("train_file_path", "train_mltable_path"),
    ):
        if not set(needed) & set(values):
            faults.append(f"One of {', '.join(needed)} is needed")
    faults += _compute_faults(cloud, workspace, values)
    if faults:
        details = [{"code": "InvalidInput", "message": fault} for fault in faults]
        raise bad("; ".join(faults), "UserError", details=details)
    bound = {}
    for name, value in (node.get("outputs") or {}).items():
        if name not in offers.OUTPUTS:
            raise bad(f"The component has no output '{name}'.")
        match = _PARENT.fullmatch(str((value or {}).get("value", "")))
        if match and match.group(2) in (given.get("outputs") or {}):
            bound[name] = match.group(2)
    inputs = {n: _input(cloud, workspace, n, v) for n, v in values.items()}
    return JobPlan(inputs=inputs, bound=bound)


def _compute_faults(cloud: Cloud, workspace: Json, values: dict[str, Json]) -> list[str]:
    """Clusters that do not exist, a machine without enough GPUs, an archived model."""
    faults = []
    texts = {n: str(v.get("value")) for n, v in values.items() if v.get("value") is not None}
    size = None
    if texts.get("compute_finetune", "serverless") == "serverless":
        name = texts.get("instance_type_finetune", "Standard_nc24rs_v3")  # a default long retired
        size = offers.find_size(name)
        if size is None:
            faults.append(f"The VM size '{name}' is not available")
    for step in ("model_import", "preprocess", "finetune"):
        cluster = texts.get(f"compute_{step}", "serverless")
        doc = cloud.get(f"{workspace['id']}/computes/{cluster}")
        if cluster != "serverless" and doc is None:
            faults.append(f"The compute target '{cluster}' was not found")
        elif doc and step == "finetune":
            size = offers.find_size(doc["properties"]["properties"]["vmSize"])
    if size and size[1].gpus == 0:
        faults.append(f"SKUNotSupported: '{size[0]}' has no GPU")
    gpus = int(texts.get("number_of_gpu_to_use_finetuning", "1"))
    if size and gpus > max(size[1].gpus, 1):
        faults.append(f"{gpus} GPUs are requested; '{size[0]}' has {size[1].gpus}")
    model = offers.find_model(str((values.get("mlflow_model_path") or {}).get("uri") or ""))
    if model and model[1].archived:
        faults.append(f"The model '{model[0]}' is archived and cannot be used in new jobs")
    return faults


# --- run history: details and logs ---

_RUN = "/history/v1.0" + WORKSPACE + "/runs/{name}"


@route("GET", REGIONAL, _RUN + "/details", audience="regional")
def job_details(cloud: Cloud, request: Request) -> Reply:
    """Status and the signed addresses of the logs."""
    job, workspace = need_job(cloud, request), need_workspace(cloud, request)
    account = storage_account(workspace)
    container = container_of(workspace, "workspaceartifactstore")
    prefix = f"ExperimentRun/dcid.{job['name']}/"
    logs = BlobFiles(cloud.folder, account).names(container, prefix)
    base, sas = f"https://{account}.blob.core.windows.net/{container}", account_sas(cloud, account)
    times = job.get("_times", {})
    body: Json = {
        "runId": job["name"],
        "target": "rehearsal",
        "status": job["properties"]["status"],
        "startTimeUtc": times.get("start"),
        "endTimeUtc": times.get("end"),
        "properties": job["properties"].get("properties") or {},
        "logFiles": {log[len(prefix) :]: f"{base}/{quote(log)}?{sas}" for log in logs},
        "warnings": [],
    }
    if job.get("_error"):
        body["error"] = {"error": job["_error"]}
    return Reply(200, body)


@route("GET", REGIONAL, _RUN, audience="regional")
def get_run(cloud: Cloud, request: Request) -> Reply:
    """A job as run history has it."""
    return Reply(200, _run_of(need_job(cloud, request)))


@route("GET", REGIONAL, _RUN + "/children", audience="regional")
def list_children(cloud: Cloud, request: Request) -> Reply:
    """The steps of a pipeline: none, because a rehearsed one is a single process."""
    need_job(cloud, request)
    return Reply(200, {"value": []})


@route("POST", REGIONAL, "/history/v1.0" + WORKSPACE + "/rundata", audience="regional")
def run_data(cloud: Cloud, request: Request) -> Reply:
    """A run with its outputs as data assets, for `jobs.download`."""
    request.args["name"] = str(request.json().get("runId"))
    job = need_job(cloud, request)
    outputs = {
        name: {"assetId": value["uri"], "type": value.get("jobOutputType")}
        for name, value in job["properties"]["outputs"].items()
        if name != "default"
    }
    run = {**_run_of(job), "outputs": outputs}
    return Reply(200, {"runMetadata": run, "runDefinition": None, "jobSpecification": None})


_ASSETS = "/{kind:data|modelregistry}/v1.0" + WORKSPACE + "/{list:dataversion|models}"


@route("POST", REGIONAL, _ASSETS + "/batchGetResolvedUris", audience="regional")
def resolve_assets(_cloud: Cloud, request: Request) -> Reply:
    """The address of each asset's files: here the asset's own."""
    data, uris = request.args["kind"] == "data", request.json().get("values") or []
    more = {"type": "uri_folder"} if data else {"modelType": "MLFLOW"}
    return Reply(200, {"values": {uri: {"uri" if data else "path": uri, **more} for uri in uris}})


def _run_of(job: Json) -> Json:
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
