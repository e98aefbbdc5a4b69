"""Deployments of managed online endpoints: each is our own server on the model's files.

Writes deployments/<endpoint>/<deployment>.log in the rehearsal's folder.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from pathlib import Path

from . import access, assets, catalogue, compute, foundation, registries, servers
from .cloud import Cloud, listed, public, route, stamps
from .endpoints import DEPLOYMENT_KIND, ENDPOINT, NAME, need_endpoint
from .errors import RehearsalError
from .servers import stop_server
from .wire import ARM, AzureError, Json, Reply, Request, asset_id, bad
from .workspaces import need_workspace

_DEPLOYMENT = ENDPOINT + "/deployments/{deployment}"


@route("PUT", ARM, _DEPLOYMENT)
def put_deployment(cloud: Cloud, request: Request) -> Reply:
    """Make or change a deployment: starts our server on the model."""
    endpoint, body = need_endpoint(cloud, request), request.json()
    workspace = need_workspace(cloud, request)
    name, given = request.args["deployment"], body.get("properties") or {}
    if not 3 <= len(name) <= 32 or not NAME.fullmatch(name):
        raise bad(f"The deployment name '{name}' is invalid.", "InvalidDeploymentName")
    if endpoint["properties"]["provisioningState"] != "Succeeded":
        raise AzureError(409, "Conflict", f"The endpoint '{endpoint['name']}' is not ready.")
    arm_id = request.id(_DEPLOYMENT)
    before = cloud.get(arm_id)
    if before and before["properties"]["provisioningState"] in ("Creating", "Updating"):
        raise AzureError(409, "Conflict", f"The deployment '{name}' is being changed already.")
    real = _check_size(cloud, workspace, given, body, before)
    folder = _model_folder(cloud, workspace, given)
    error = _role_fault(cloud, workspace, endpoint)
    if before:
        stop_server(before)
    document = {
        "location": workspace["location"],
        "tags": body.get("tags") or {},
        "kind": "Managed",
        "sku": {"name": "Default", "capacity": int((body.get("sku") or {}).get("capacity") or 1)},
        "systemData": before["systemData"] if before else stamps(),
        "properties": {
            **given,
            "scaleSettings": given.get("scaleSettings") or {"scaleType": "Default"},
            "endpointComputeType": "Managed",
            "instanceType": real,
            "provisioningState": "Updating" if before else "Creating",
        },
        "_model": str(folder),
    }
    deployment = cloud.put(arm_id, DEPLOYMENT_KIND, document)
    operation = cloud.operate(deployment, seconds=-1)
    starter = threading.Thread(
        target=_bring_up, args=(cloud, deployment, operation["name"], error), daemon=True
    )
    starter.start()
    return cloud.accepted(deployment, operation, 200 if before else 201)


def _check_size(cloud: Cloud, workspace: Json, given: Json, body: Json, before: Json | None) -> str:
    """The size in Azure's spelling, if it can be deployed and there is quota."""
    wanted = str(given.get("instanceType") or "Standard_F4s_v2")
    found = catalogue.find_size(wanted)
    if found is None or not found[1].deployable:
        raise bad(
            f"The instance type '{wanted}' is not supported for managed online deployments.",
            "BadArgument",
        )
    settings = given.get("requestSettings") or {}
    timeout = str(settings.get("requestTimeout") or "PT5S")
    seconds = re.fullmatch(r"PT(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?", timeout)
    if not seconds or 60 * int(seconds[1] or 0) + float(seconds[2] or 0) > 180:
        raise bad("The request timeout must be at most 180 seconds.", "BadArgument")
    real, size = found
    need = compute.deployment_cores(size, int((body.get("sku") or {}).get("capacity") or 1))
    location = workspace["location"]
    taken = compute.used(cloud, location, size.family)
    if before:
        old = catalogue.find_size(before["properties"]["instanceType"])
        if old and old[1].family == size.family:
            taken -= compute.deployment_cores(old[1], before["sku"]["capacity"])
    limit = compute.limit_of(cloud, location, size.family)
    if taken + need > limit:
        message = (
            f"Not enough quota available for {real} in {location}. Current usage/limit: "
            f"{taken}/{limit}. Additional needed: {need}"
        )
        details = [{"code": "OutOfQuota", "message": message}]
        raise bad(message, "OutOfQuota", details=details)
    return real


def _model_folder(cloud: Cloud, workspace: Json, given: Json) -> Path:
    """Where the weights of the deployed model lie. Raises AzureError."""
    asked = asset_id(given.get("model"))
    if not asked:
        raise bad("The deployment names no model.", "BadArgument")
    registered = registries.find_model(asked)
    if asked.startswith("azureml://registries/"):
        if registered is None or registered[1]:
            raise bad(f"The model '{asked}' is archived or does not exist.", "BadArgument")
        return cloud.folder / "catalogue" / "mlflow"
    doc = cloud.get(asked)
    if doc is None:
        raise bad(f"The model '{asked}' was not found.", "BadArgument")
    if doc["properties"].get("isArchived"):
        raise bad(f"The model '{asked}' is archived and cannot be deployed.", "BadArgument")
    script = given.get("codeConfiguration") or {}
    for part in (given.get("environmentId"), script.get("codeId")):
        if asset_id(part).startswith("/subscriptions/") and cloud.get(asset_id(part)) is None:
            raise bad(f"The asset '{part}' was not found.", "BadArgument")
    mlflow = "mlflow" in str(doc["properties"].get("modelType", "")).lower()
    if not mlflow and not (given.get("environmentId") and given.get("codeConfiguration")):
        raise bad("A custom model needs an environment and a scoring script.", "BadArgument")
    return assets.locate(cloud, workspace, doc["properties"]["modelUri"])


def _role_fault(cloud: Cloud, workspace: Json, endpoint: Json) -> Json | None:
    """What a user-assigned identity may not do; a system-assigned one gets its roles by itself."""
    users = (endpoint.get("identity") or {}).get("userAssignedIdentities") or {}
    properties = workspace["properties"]
    for user, item in users.items():
        for need, scope, what in (
            (access.PULLS_IMAGES, properties.get("containerRegistry"), "AcrPull"),
            (access.READS_BLOBS, properties["storageAccount"], "Storage Blob Data Reader"),
        ):
            if scope and not need & access.roles_of(cloud, item["principalId"], scope):
                message = (
                    f"The identity '{user.rsplit('/', 1)[-1]}' lacks the role {what} on '{scope}'."
                )
                return {"code": "UserIdentityLacksPermission", "message": message}
    return None


def log_file(cloud: Cloud, deployment: Json) -> Path:
    """Where the server of a deployment writes its log."""
    endpoint = str(deployment["id"]).split("/")[-3]
    return cloud.folder / "deployments" / endpoint / f"{deployment['name']}.log"


def server_key(cloud: Cloud, deployment: Json) -> str:
    """The key between the front and the server; nobody else knows it."""
    return cloud.derive("server", deployment["id"])


def _bring_up(cloud: Cloud, deployment: Json, operation: str, error: Json | None) -> None:
    """Start the server and end the operation; runs in a thread of its own."""
    log = log_file(cloud, deployment)
    time.sleep(cloud.faults.slowness(deployment["id"], "deployment"))
    error = error or cloud.faults.failure(deployment["id"], "deployment")
    started = None
    if error is None:
        try:
            started = _start_server(cloud, deployment, log)
        except RehearsalError as problem:
            error = {"code": "ResourceNotReady", "message": str(problem).splitlines()[0]}
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{error['code']}: {error['message']}\n", encoding="utf-8")
    with cloud.lock:
        present = cloud.get(deployment["id"])
        if started and (present is None or present is not deployment):
            servers.stop(started.process)  # deleted meanwhile
        elif started and present is not None:
            present["_server"] = {
                **dataclasses.asdict(started.process),
                "port": started.port,
            }
        cloud.finish(operation, error)
        cloud.save()


def _start_server(cloud: Cloud, deployment: Json, log: Path) -> servers.Server:
    folder = Path(deployment["_model"])
    if folder == cloud.folder / "catalogue" / "mlflow":
        foundation.make(cloud.folder / "catalogue")
    weights = foundation.weights_in(folder)
    if weights is None:
        raise RehearsalError(f"No weights were found in the model of '{deployment['name']}'.")
    settings = deployment["properties"].get("requestSettings") or {}
    config = {
        "engine": "transformers",
        "model_dir": str(weights),
        "num_threads": 1,
        "deployment": deployment["name"],
        "max_concurrent_requests_per_instance": int(
            settings.get("maxConcurrentRequestsPerInstance") or 1
        ),
        "request_timeout_ms": _milliseconds(str(settings.get("requestTimeout") or "PT5S")),
    }
    return servers.start(config, key=server_key(cloud, deployment), log_path=log)


def _milliseconds(duration: str) -> int:
    match = re.fullmatch(r"PT(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?", duration)
    minutes, seconds = (match[1], match[2]) if match else (None, None)
    return max(100, int(1000 * (60 * int(minutes or 0) + float(seconds or 0))))


def resume(cloud: Cloud) -> None:
    """After a restart: deployments that were being made are made again, dead servers started."""
    for deployment in cloud.children("/subscriptions", DEPLOYMENT_KIND):
        running = [
            name
            for name, op in cloud.operations.items()
            if op["resource"] == deployment["id"] and op["status"] == "InProgress"
        ]
        server = servers.process_of(deployment)
        alive = server is not None and server.find() is not None
        ready = deployment["properties"]["provisioningState"] == "Succeeded"
        if running or (ready and not alive):
            name = running[0] if running else cloud.operate(deployment, seconds=-1)["name"]
            arguments = (cloud, deployment, name, None)
            threading.Thread(target=_bring_up, args=arguments, daemon=True).start()


@route("GET", ARM, _DEPLOYMENT)
def get_deployment(cloud: Cloud, request: Request) -> Reply:
    """One deployment."""
    return Reply(200, public(_need_deployment(cloud, request)))


@route("GET", ARM, ENDPOINT + "/deployments")
def list_deployments(cloud: Cloud, request: Request) -> Reply:
    """All deployments of an endpoint."""
    return listed(cloud.children(need_endpoint(cloud, request)["id"], DEPLOYMENT_KIND))


@route("DELETE", ARM, _DEPLOYMENT)
def delete_deployment(cloud: Cloud, request: Request) -> Reply:
    """Delete a deployment that gets no traffic."""
    endpoint = need_endpoint(cloud, request)
    found = cloud.get(request.id(_DEPLOYMENT))
    if found is None:
        return Reply(204)
    traffic = endpoint["properties"].get("traffic") or {}
    if traffic.get(found["name"], 0) > 0:
        raise bad(
            f"The deployment '{found['name']}' has {traffic[found['name']]} % of the traffic; "
            "set it to 0 before deleting it.",
            "DeploymentHasTraffic",
        )
    stop_server(found)
    traffic.pop(found["name"], None)
    found["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(found, cloud.operate(found, kind="delete"), 202, body=False)


@route("POST", ARM, _DEPLOYMENT + "/getLogs")
def get_logs(cloud: Cloud, request: Request) -> Reply:
    """The last lines of the server's log."""
    deployment = _need_deployment(cloud, request)
    log = log_file(cloud, deployment)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = text.splitlines()[-int(request.json().get("tail") or 50) :]
    return Reply(200, {"content": "\n".join(lines)})


def _need_deployment(cloud: Cloud, request: Request) -> Json:
    need_endpoint(cloud, request)
    found = cloud.get(request.id(_DEPLOYMENT))
    if found is None:
        name = request.args["deployment"]
        raise AzureError(404, "ResourceNotFound", f"The deployment '{name}' was not found.")
    return found
