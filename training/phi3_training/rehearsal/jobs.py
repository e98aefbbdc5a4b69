"""Jobs of a workspace: checked as Azure checks them, run for real in a process of their own.

Writes jobs/<name>/ in the rehearsal's folder: job.json for the process, status.json from it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil

from ..run import write_atomically
from . import assets, catalogue, component, foundation, registries
from .cloud import Cloud, listed, now, public, stamps
from .storage import BlobFiles
from .teardown import ACTIVE
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, bad, route
from .workspaces import container_of, need_workspace, storage_account

KIND = f"{ML}/workspaces/jobs"
_JOB = WORKSPACE + "/jobs/{name}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,254}")
_LITERAL, _PARENT = "literal", re.compile(r"\$\{\{parent\.(inputs|outputs)\.([\w-]+)\}\}")
_SAME_SECONDS = 1.0


@route("PUT", ARM, _JOB)
def put_job(cloud: Cloud, request: Request) -> Reply:
    """Submit a job; a name that exists already is answered with the job it names."""
    workspace, body = need_workspace(cloud, request), request.json()
    name, given = request.args["name"], body.get("properties") or {}
    before = cloud.get(request.id(_JOB))
    if before is not None:
        for key in ("tags", "displayName", "description"):
            if given.get(key) is not None:
                before["properties"][key] = given[key]
        return Reply(200, public(refreshed(cloud, before)))
    if not _NAME.fullmatch(name):
        raise bad(f"Job name '{name}' is invalid.", "ValidationError")
    kind = str(given.get("jobType"))
    if kind not in ("Command", "Pipeline"):
        raise AzureError(501, "NotRehearsed", f"Jobs of type {kind} are not rehearsed")
    plan = (
        _command(cloud, workspace, given)
        if kind == "Command"
        else _pipeline(cloud, workspace, given)
    )
    document = _document(cloud, workspace, name, given)
    job = cloud.put(request.id(_JOB), KIND, document)
    _start(cloud, workspace, job, plan)
    return Reply(201, public(job))


def _document(cloud: Cloud, workspace: Json, name: str, given: Json) -> Json:
    """The job as it is answered: every output has an address, the studio a page."""
    store = f"azureml://datastores/workspaceblobstore/paths/azureml/{name}"
    artifacts = f"azureml://datastores/workspaceartifactstore/ExperimentRun/dcid.{name}"
    outputs: Json = {}
    for output, value in (given.get("outputs") or {}).items():
        value = dict(value or {})
        value["uri"] = value.get("uri") or f"{store}/{output}/"
        outputs[output] = value
    default = {"default": {"jobOutputType": "uri_folder", "uri": artifacts}}
    if given["jobType"] == "Command":
        outputs |= default
    workspace_id = workspace["id"]
    page = f"https://ml.azure.com/runs/{name}?wsid={workspace_id}"
    services = {
        "Studio": {"jobServiceType": "Studio", "endpoint": page},
        "Tracking": {
            "jobServiceType": "Tracking",
            "endpoint": workspace["properties"]["mlFlowTrackingUri"],
        },
    }
    properties = {
        **given,
        "experimentName": given.get("experimentName") or "Default",
        "displayName": given.get("displayName") or name,
        "outputs": outputs,
        "services": services,
        "status": "NotStarted",
        "isArchived": False,
        "properties": {**(given.get("properties") or {}), "ContentSnapshotId": str(uuid.uuid4())},
    }
    return {"properties": properties, "systemData": stamps(), "_artifacts": artifacts}


def _command(cloud: Cloud, workspace: Json, given: Json) -> Json:
    """What the process of a command job needs, after Azure's checks."""
    size = _size_of(cloud, workspace, given)
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
        doc = cloud.get(str(code).removeprefix("azureml:"))
        if doc is None:
            raise bad(f"The code '{code}' was not found.")
        place = str(assets.locate(cloud, workspace, doc["properties"]["codeUri"]))
    distribution = given.get("distribution") or {}
    nodes = int((given.get("resources") or {}).get("instanceCount") or 1)
    each = int(distribution.get("processCountPerInstance") or 1) if distribution else 1
    gpus = size.gpus if size else 0
    if distribution and gpus and each > gpus:
        raise bad(f"{each} processes are asked for on a node with {gpus} GPUs.")
    return {
        "kind": "command",
        "command": command,
        "code": place,
        "inputs": {name: _input(cloud, workspace, name, v) for name, v in inputs.items()},
        "environment": given.get("environmentVariables") or {},
        "nodes": nodes if distribution else 1,
        "processes": each,
        "limits": given.get("limits") or {},
    }


def _size_of(cloud: Cloud, workspace: Json, given: Json) -> catalogue.Size | None:
    """The machine of a job, after a look at the cluster and its room. Raises AzureError."""
    compute_id = given.get("computeId")
    resources = given.get("resources") or {}
    wanted = int(resources.get("instanceCount") or 1)
    if not compute_id:
        found = catalogue.find_size(str(resources.get("instanceType") or ""))
        if found is None:
            raise bad("A job without a compute target needs resources.instance_type.")
        return found[1]
    cluster = cloud.get(str(compute_id))
    if cluster is None:
        name = str(compute_id).rsplit("/", 1)[-1]
        raise bad(f"The compute target '{name}' was not found in the workspace.")
    inner = cluster["properties"]["properties"]
    most = int((inner.get("scaleSettings") or {}).get("maxNodeCount", 1))
    if wanted > most:
        raise bad(f"The job needs {wanted} nodes; the cluster '{cluster['name']}' has {most}.")
    found = catalogue.find_size(inner["vmSize"])
    return found[1] if found else None


def _input(cloud: Cloud, workspace: Json, name: str, value: Json) -> Json:
    """An input as a literal or as the folder or file it lies in. Raises AzureError."""
    if value.get("jobInputType") == _LITERAL:
        return {"literal": str(value.get("value"))}
    uri = str(value.get("uri") or "")
    registered = foundation.asset(cloud, workspace, uri)
    place = registered or assets.locate(cloud, workspace, _asset_uri(cloud, uri))
    if registered is None and not place.exists():
        raise bad(f"The input '{name}' has no data at '{uri}'.", "UserError")
    return {"path": str(place)}


def _asset_uri(cloud: Cloud, uri: str) -> str:
    """The address of a registered asset's files."""
    doc = cloud.get(uri.removeprefix("azureml:"))
    if doc is None:
        return uri
    properties = doc["properties"]
    return str(properties.get("modelUri") or properties.get("dataUri") or uri)


def _pipeline(cloud: Cloud, workspace: Json, given: Json) -> Json:
    """What the process of a pipeline job needs, after a look at every input."""
    nodes = given.get("jobs") or {}
    if len(nodes) != 1:
        raise AzureError(501, "NotRehearsed", "Only pipelines of one component are rehearsed")
    ((_name, node),) = nodes.items()
    match = re.search(r"registries/azureml/components/([^/]+)/versions/(.+)", _id_of(node))
    if not match or match.groups() != (component.NAME, component.VERSION):
        raise bad(f"The component '{_id_of(node)}' was not found.")
    values = {
        name: _resolved(value, given.get("inputs") or {})
        for name, value in (node.get("inputs") or {}).items()
    }
    faults = _faults(values)
    faults += _compute_faults(cloud, workspace, values)
    if faults:
        details = [{"code": "InvalidInput", "message": fault} for fault in faults]
        raise bad("; ".join(faults), "UserError", details=details)
    return {
        "kind": "pipeline",
        "inputs": {n: _input(cloud, workspace, n, v) for n, v in values.items()},
        "bound": _bound_outputs(node, given),
    }


def _id_of(node: Json) -> str:
    return str(node.get("componentId") or node.get("component") or "")


def _resolved(value: Json, parent: Json) -> Json:
    """A node's input; what is bound to the pipeline's inputs replaced by those."""
    bound = _PARENT.fullmatch(str(value.get("value", "")))
    if bound is None:
        kind = value.get("job_input_type") or value.get("jobInputType")
        return {"jobInputType": kind, "value": value.get("value"), "uri": value.get("uri")}
    if bound.group(2) not in parent:
        raise bad(f"The pipeline has no input '{bound.group(2)}'.")
    found: Json = parent[bound.group(2)]
    return found


def _faults(values: dict[str, Json]) -> list[str]:
    """What the component would refuse: unknown inputs, wrong types, no model, no data."""
    faults = []
    for name, value in values.items():
        known = component.INPUTS.get(name)
        if known is None:
            faults.append(f"Unknown input '{name}' of {component.NAME}")
        elif known.is_literal != (value.get("jobInputType") == _LITERAL):
            faults.append(f"Input '{name}' must be of type {known.kind}")
        elif not known.is_literal and value["jobInputType"] != known.kind:
            faults.append(f"Input '{name}' is {value['jobInputType']}, expected {known.kind}")
        elif known.is_literal and (fault := known.fault(value.get("value"))):
            faults.append(f"Input '{name}': {fault}")
    if not {"mlflow_model_path", "pytorch_model_path", "huggingface_id"} & set(values):
        faults.append("One of mlflow_model_path, pytorch_model_path, huggingface_id is needed")
    if not {"train_file_path", "train_mltable_path"} & set(values):
        faults.append("One of train_file_path, train_mltable_path is needed")
    return faults


def _compute_faults(cloud: Cloud, workspace: Json, values: dict[str, Json]) -> list[str]:
    faults = []
    asked = {n: str(v.get("value")) for n, v in values.items() if v.get("value") is not None}
    name = asked.get("compute_finetune", "serverless")
    found = None
    if name == "serverless":
        size = asked.get("instance_type_finetune", "Standard_nc24rs_v3")
        found = catalogue.find_size(size)
        if found is None:
            faults.append(f"The VM size '{size}' is not available")
    for step in ("model_import", "preprocess", "finetune"):
        cluster = asked.get(f"compute_{step}", "serverless")
        doc = cloud.get(f"{workspace['id']}/computes/{cluster}")
        if cluster != "serverless" and doc is None:
            faults.append(f"The compute target '{cluster}' was not found")
        elif doc and step == "finetune":
            found = catalogue.find_size(doc["properties"]["properties"]["vmSize"])
    if found and found[1].gpus == 0:
        faults.append(f"SKUNotSupported: '{found[0]}' has no GPU")
    wanted = int(asked.get("number_of_gpu_to_use_finetuning", "1"))
    if found and wanted > max(found[1].gpus, 1):
        faults.append(f"{wanted} GPUs are asked for; '{found[0]}' has {found[1].gpus}")
    model = registries.find_model(str((values.get("mlflow_model_path") or {}).get("uri") or ""))
    if model and model[1]:
        faults.append(f"The model '{model[0]}' is archived and cannot be used in new jobs")
    return faults


def _bound_outputs(node: Json, given: Json) -> dict[str, str]:
    """For each output of the component, the pipeline's output that it becomes."""
    bound = {}
    for name, value in (node.get("outputs") or {}).items():
        match = _PARENT.fullmatch(str((value or {}).get("value", "")))
        if name not in component.OUTPUTS:
            raise bad(f"The component has no output '{name}'.")
        if match and match.group(2) in (given.get("outputs") or {}):
            bound[name] = match.group(2)
    return bound


def _start(cloud: Cloud, workspace: Json, job: Json, plan: Json) -> None:
    """Write job.json and start the process that carries the job out."""
    folder = cloud.folder / "jobs" / job["name"]
    folder.mkdir(parents=True, exist_ok=True)
    files = BlobFiles(cloud.folder, storage_account(workspace))
    artifacts = files.data / container_of(workspace, "workspaceartifactstore")
    outputs = {
        name: str(assets.locate(cloud, workspace, value["uri"]))
        for name, value in job["properties"]["outputs"].items()
        if name != "default"
    }
    plan |= {
        "name": job["name"],
        "experiment": job["properties"]["experimentName"],
        "workspace": workspace["id"],
        "outputs": outputs,
        "artifacts": str(artifacts / "ExperimentRun" / f"dcid.{job['name']}"),
        "catalogue": str(cloud.folder / "catalogue"),
        "slow": cloud.faults.slowness(job["id"]),
        "fail": cloud.faults.failure(job["id"], "job"),
    }
    write_atomically(folder / "job.json", json.dumps(plan, indent=1))
    with (folder / "process.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", "phi3_training.rehearsal.jobrun", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_environment(),
            start_new_session=True,  # cancelling ends the whole group
        )
    _children[process.pid] = process
    created = psutil.Process(process.pid).create_time()
    job["_process"] = {"pid": process.pid, "create_time": created}


_children: dict[int, subprocess.Popen[bytes]] = {}


def child_environment() -> dict[str, str]:
    """Ours, without what belongs to a caller of Azure: a job gets its own."""
    dropped = ("AZURE_", "PHI3_", "ARM_", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith(dropped)}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    absolute = dict.fromkeys(str(Path(path).resolve()) for path in paths)
    programs = str(Path(sys.executable).parent)
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(absolute),
        "PATH": os.pathsep.join([programs, environment.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }


def refreshed(cloud: Cloud, job: Json) -> Json:
    """The job with the status that its process has come to."""
    properties = job["properties"]
    if properties["status"] not in ACTIVE:
        return job
    file = cloud.folder / "jobs" / job["name"] / "status.json"
    told: Json = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    status = told.get("status", "NotStarted")
    if status in ACTIVE and _process_of(job) is None:
        # Read again: it may have ended between the two looks.
        told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        status = told.get("status", "NotStarted")
        if status in ACTIVE:
            message = "The node went away while the job ran."
            told, status = {"error": {"code": "SystemError", "message": message}}, "Failed"
    properties["status"] = status
    job["_times"] = {k: told[k] for k in ("start", "end") if k in told}
    if told.get("error"):
        job["_error"] = told["error"]
    return job


def _process_of(job: Json) -> psutil.Process | None:
    """The very process of the job, while it lives."""
    known = job.get("_process") or {}
    child = _children.get(known.get("pid", 0))
    if child is not None and child.poll() is not None:
        return None
    try:
        process = psutil.Process(known["pid"])
        same = abs(process.create_time() - known["create_time"]) < _SAME_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, KeyError):
        return None


def cancel(cloud: Cloud, job: Json) -> None:
    """End the job's processes and say so."""
    if refreshed(cloud, job)["properties"]["status"] not in ACTIVE:
        return
    process = _process_of(job)
    if process is not None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
    job["properties"]["status"] = "Canceled"
    job.setdefault("_times", {})["end"] = now()
    file = cloud.folder / "jobs" / job["name"] / "status.json"
    write_atomically(file, json.dumps({"status": "Canceled", **job["_times"]}))


@route("GET", ARM, _JOB)
def get_job(cloud: Cloud, request: Request) -> Reply:
    """One job."""
    return Reply(200, public(need_job(cloud, request)))


@route("GET", ARM, WORKSPACE + "/jobs")
def list_jobs(cloud: Cloud, request: Request) -> Reply:
    """All jobs, newest first."""
    found = cloud.children(need_workspace(cloud, request)["id"], KIND)[::-1]
    view = request.query.get("listviewtype", "ActiveOnly").lower()
    kept = [
        d for d in found if view == "all" or d["properties"]["isArchived"] == (view[0:2] == "ar")
    ]
    return listed([refreshed(cloud, job) for job in kept])


@route("POST", ARM, _JOB + "/cancel")
def cancel_job(cloud: Cloud, request: Request) -> Reply:
    """Cancel a job; one that has ended stays as it is."""
    job = need_job(cloud, request)
    cancel(cloud, job)
    return Reply(200)


@route("DELETE", ARM, _JOB)
def delete_job(cloud: Cloud, request: Request) -> Reply:
    """Forget a job that has ended."""
    job = need_job(cloud, request)
    if job["properties"]["status"] in ACTIVE:
        raise AzureError(409, "Conflict", f"The job '{job['name']}' is still running.")
    return cloud.accepted(job, cloud.operate(job, kind="delete"), 202, body=False)


def need_job(cloud: Cloud, request: Request) -> Json:
    """The job that the request names, up to date. Raises AzureError (404)."""
    need_workspace(cloud, request)
    found = cloud.get(request.id(_JOB))
    if found is None:
        name = request.args["name"]
        raise AzureError(404, "UserError", f"Run {name} could not be found")
    return refreshed(cloud, found)


def running_on(cloud: Cloud, compute_id: str) -> str | None:
    """The name of a job that runs on a cluster."""
    for job in cloud.children(compute_id.rsplit("/computes/", 1)[0], KIND):
        if refreshed(cloud, job)["properties"]["status"] not in ACTIVE:
            continue
        text = json.dumps(job["properties"]).lower()
        name = compute_id.rsplit("/", 1)[-1].lower()
        if compute_id.lower() in text or f'"value": "{name}"' in text:
            return str(job["name"])
    return None


def nodes_of(cloud: Cloud, job: Json, location: str) -> list[tuple[str, int]]:
    """Size and number of the nodes that a running job holds in a region."""
    if job["properties"]["status"] not in ACTIVE:
        return []
    cluster: Any = cloud.get(str(job["properties"].get("computeId") or ""))
    if cluster is None or cluster["location"] != location:
        return []
    count = int((job["properties"].get("resources") or {}).get("instanceCount") or 1)
    return [(cluster["properties"]["properties"]["vmSize"], count)]
