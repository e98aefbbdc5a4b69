"""Jobs of a workspace: checked as Azure checks them, run for real in a process of their own.

Writes jobs/<name>/ in the rehearsal's folder: job.json for the process, status.json from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys

import psutil

from . import assets, submission
from .cloud import Cloud, listed, now, public, route
from .processes import ProcessId, child_environment, write_atomically
from .storage import BlobFiles
from .teardown import ACTIVE
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, bad
from .workspaces import container_of, need_workspace, storage_account

KIND = f"{ML}/workspaces/jobs"
_JOB = WORKSPACE + "/jobs/{name}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,254}")


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
    if kind == "Pipeline":
        submission.check_user_token(cloud, request.headers.get("x-azureml-token"))
    plan = (
        submission.command(cloud, workspace, given)
        if kind == "Command"
        else submission.pipeline(cloud, workspace, given)
    )
    document = submission.document(workspace, name, given)
    job = cloud.put(request.id(_JOB), KIND, document)
    _start(cloud, workspace, job, plan)
    return Reply(201, public(job))


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
        "slow": cloud.faults.slowness(job["id"], "job"),
        "fail": cloud.faults.failure(job["id"], "job"),
    }
    write_atomically(folder / "job.json", json.dumps(plan, indent=1))
    with (folder / "process.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", "phi3_rehearsal", "job", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_environment(),
            start_new_session=True,  # cancelling ends the whole group
        )
    _children[process.pid] = process
    job["_process"] = dataclasses.asdict(ProcessId.of(process.pid))


_children: dict[int, subprocess.Popen[bytes]] = {}


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
    return ProcessId(known["pid"], known["create_time"]).find() if known else None


def _kill(process: psutil.Process) -> None:
    """The process that carries the job out, and all that it started."""
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(10)


def cancel(cloud: Cloud, job: Json) -> None:
    """End the job's processes and say so."""
    if refreshed(cloud, job)["properties"]["status"] not in ACTIVE:
        return
    process = _process_of(job)
    if process is not None:
        _kill(process)
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
    archived = view == "archivedonly"
    kept = [d for d in found if view == "all" or d["properties"]["isArchived"] == archived]
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


def nodes_on(cloud: Cloud, compute_id: str) -> list[str]:
    """For each node of a cluster that is in use, the name of the job that runs on it."""
    busy = []
    name = compute_id.rsplit("/", 1)[-1].lower()
    for job in cloud.children(compute_id.rsplit("/computes/", 1)[0], KIND):
        if refreshed(cloud, job)["properties"]["status"] not in ACTIVE:
            continue
        text = json.dumps(job["properties"]).lower()
        if compute_id.lower() in text or f'"value": "{name}"' in text:
            resources = job["properties"].get("resources") or {}
            busy += [str(job["name"])] * int(resources.get("instanceCount") or 1)
    return busy
