"""Managed online endpoints: the endpoints with their keys and traffic, their deployments
(each our own server on the model's files), and the front that lets requests through to one.

Writes deployments/<endpoint>/<deployment>.log in the rehearsal's folder.
"""

from __future__ import annotations

import dataclasses
import hmac
import http.client
import random
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from . import assets, compute, identity, offers, processes, tiny_model
from .cloud import TENANT, Cloud, listed, public, route, stamps
from .identity import claims_of, sign
from .processes import RehearsalError, stop_server_of
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, asset_id, bad
from .workspaces import need_workspace

KIND = f"{ML}/workspaces/onlineEndpoints"
DEPLOYMENT_KIND = f"{KIND}/deployments"
ENDPOINT = WORKSPACE + "/onlineEndpoints/{name}"
NAME = re.compile(r"[A-Za-z](?!.*--)[A-Za-z0-9-]{1,30}[A-Za-z0-9]")
_KEY_LIFE = 3600 * 12


@route("PUT", ARM, ENDPOINT)
def put_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Make an endpoint, or change its traffic and tags."""
    workspace, body = need_workspace(cloud, request), request.json()
    name, given = request.args["name"], body.get("properties") or {}
    before = cloud.get(request.id(ENDPOINT))
    _check_endpoint(cloud, workspace, name, given, before)
    document = {
        "location": workspace["location"],
        "tags": body.get("tags") or {},
        "kind": "Managed",
        "identity": _identity(cloud, request.id(ENDPOINT), body.get("identity")),
        "systemData": before["systemData"] if before else stamps(),
        "properties": {
            **given,
            "traffic": _traffic(cloud, request.id(ENDPOINT), given.get("traffic") or {}),
            "publicNetworkAccess": given.get("publicNetworkAccess") or "Enabled",
            "scoringUri": f"https://{name}.{workspace['location']}.inference.ml.azure.com/score",
            "swaggerUri": f"https://{name}.{workspace['location']}.inference.ml.azure.com/"
            "swagger.json",
            "provisioningState": "Updating" if before else "Creating",
        },
        "_keys": before["_keys"] if before else {"primary": 0, "secondary": 0},
    }
    endpoint = cloud.put(request.id(ENDPOINT), KIND, document)
    return cloud.accepted(endpoint, cloud.operate(endpoint), 200 if before else 201)


def _check_endpoint(
    cloud: Cloud, workspace: Json, name: str, given: Json, before: Json | None
) -> None:
    if not 3 <= len(name) <= 32 or not NAME.fullmatch(name):
        raise bad(
            f"The endpoint name '{name}' is invalid: 3 to 32 letters, digits and single dashes, "
            "starting with a letter.",
            "InvalidEndpointName",
        )
    if given.get("authMode") not in ("Key", "AMLToken", "AADToken"):
        raise bad(f"authMode '{given.get('authMode')}' is not supported.", "ValidationError")
    if before and before["properties"]["authMode"] != given["authMode"]:
        raise bad("The authMode of an endpoint cannot be changed.", "ValidationError")
    for other in cloud.children("/subscriptions", KIND):
        same = other["name"].lower() == name.lower() and other is not before
        if same and other["location"] == workspace["location"]:
            raise bad(
                f"The endpoint name '{name}' is taken in region '{workspace['location']}'.",
                "EndpointNameAlreadyExists",
            )
    if before and before["properties"]["provisioningState"] in ("Creating", "Updating", "Deleting"):
        raise AzureError(409, "Conflict", f"The endpoint '{name}' is being changed already.")


def _identity(cloud: Cloud, arm_id: str, given: Json | None) -> Json:
    if given and given.get("userAssignedIdentities"):
        found = {u: cloud.need(u, "identity") for u in given["userAssignedIdentities"]}
        users = {
            user: {k: doc["properties"][k] for k in ("principalId", "clientId")}
            for user, doc in found.items()
        }
        return {"type": "UserAssigned", "userAssignedIdentities": users}
    principal = str(uuid.uuid5(uuid.NAMESPACE_URL, arm_id.lower()))
    return {"type": "SystemAssigned", "principalId": principal, "tenantId": TENANT}


def _traffic(cloud: Cloud, arm_id: str, traffic: Json) -> Json:
    for name in traffic:
        if cloud.get(f"{arm_id}/deployments/{name}") is None:
            raise bad(
                f"The traffic rule names the deployment '{name}', which does not exist.",
                "InvalidTraffic",
            )
    total = sum(traffic.values())
    if total not in (0, 100):
        raise bad(f"The traffic adds up to {total}; expected 0 or 100.", "InvalidTraffic")
    return traffic


@route("PATCH", ARM, ENDPOINT)
def patch_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Change the tags."""
    found = need_endpoint(cloud, request)
    found["tags"] = {**found.get("tags", {}), **(request.json().get("tags") or {})}
    return Reply(200, public(found))


@route("GET", ARM, ENDPOINT)
def get_endpoint(cloud: Cloud, request: Request) -> Reply:
    """One endpoint."""
    return Reply(200, public(need_endpoint(cloud, request)))


@route("GET", ARM, WORKSPACE + "/onlineEndpoints")
def list_endpoints(cloud: Cloud, request: Request) -> Reply:
    """All endpoints of a workspace."""
    return listed(cloud.children(need_workspace(cloud, request)["id"], KIND))


@route("DELETE", ARM, ENDPOINT)
def delete_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Delete an endpoint with its deployments."""
    need_workspace(cloud, request)
    found = cloud.get(request.id(ENDPOINT))
    if found is None:
        return Reply(204)
    for deployment in cloud.children(found["id"], DEPLOYMENT_KIND):
        stop_server_of(deployment)
    found["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(found, cloud.operate(found, kind="delete"), 202, body=False)


@route("POST", ARM, ENDPOINT + "/listKeys")
def list_keys(cloud: Cloud, request: Request) -> Reply:
    """The two keys."""
    found = need_endpoint(cloud, request)
    if found["properties"]["authMode"] != "Key":
        raise bad("The endpoint does not use keys.", "UserError")
    return Reply(200, {f"{which}Key": key_of(cloud, found, which) for which in found["_keys"]})


@route("POST", ARM, ENDPOINT + "/regenerateKeys")
def regenerate_keys(cloud: Cloud, request: Request) -> Reply:
    """Replace one key."""
    found = need_endpoint(cloud, request)
    which = str(request.json().get("keyType", "")).lower()
    if which not in found["_keys"]:
        raise bad(f"keyType '{which}' is not supported.", "ValidationError")
    found["_keys"][which] += 1
    operation = cloud.operate(found, kind="keys")
    return cloud.accepted(found, operation, 202, body=False)


@route("POST", ARM, ENDPOINT + "/token")
def get_token(cloud: Cloud, request: Request) -> Reply:
    """A token for this endpoint."""
    found = need_endpoint(cloud, request)
    if found["properties"]["authMode"] == "Key":
        raise bad("The endpoint uses keys.", "UserError")
    value = sign(cloud, {"aud": found["id"].lower()}, _KEY_LIFE)
    expires = int(time.time()) + _KEY_LIFE
    times = {"expiryTimeUtc": expires, "refreshAfterTimeUtc": expires - 3600}
    return Reply(200, {"accessToken": value, "tokenType": "Bearer", **times})


def key_of(cloud: Cloud, endpoint: Json, which: str) -> str:
    """A key of an endpoint, in its present generation."""
    return cloud.derive("endpoint", endpoint["id"], which, str(endpoint["_keys"][which]))


def need_endpoint(cloud: Cloud, request: Request) -> Json:
    """The endpoint of the request. Raises AzureError (404)."""
    need_workspace(cloud, request)
    found = cloud.get(request.id(ENDPOINT))
    if found is None:
        name = request.args["name"]
        raise AzureError(404, "ResourceNotFound", f"The endpoint '{name}' was not found.")
    return found


# --- deployments ---

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
        stop_server_of(before)
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
    operation = cloud.operate(deployment, by_itself=False)
    starter = threading.Thread(
        target=_bring_up, args=(cloud, deployment, operation.name, error), daemon=True
    )
    starter.start()
    return cloud.accepted(deployment, operation, 200 if before else 201)


def _check_size(cloud: Cloud, workspace: Json, given: Json, body: Json, before: Json | None) -> str:
    """The size in Azure's spelling, if it can be deployed and there is quota."""
    wanted = str(given.get("instanceType") or "Standard_F4s_v2")
    found = offers.find_size(wanted)
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
        old = offers.find_size(before["properties"]["instanceType"])
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
    registered = offers.find_model(asked)
    if asked.startswith("azureml://registries/"):
        if registered is None or registered[1].archived:
            raise bad(f"The model '{asked}' is archived or does not exist.", "BadArgument")
        return tiny_model.folder_in(assets.catalogue(cloud))
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
        for (roles, what), scope in (
            (offers.PULLS_IMAGES, properties.get("containerRegistry")),
            (offers.READS_BLOBS, properties["storageAccount"]),
        ):
            if scope and not roles & identity.roles_of(cloud, item["principalId"], scope):
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
            processes.stop_server(started.process)  # deleted meanwhile
        elif started and present is not None:
            present["_server"] = {**dataclasses.asdict(started.process), "port": started.port}
        cloud.finish(operation, error)
        cloud.save()


def _start_server(cloud: Cloud, deployment: Json, log: Path) -> processes.Server:
    folder = Path(deployment["_model"])
    if folder == tiny_model.folder_in(assets.catalogue(cloud)):
        tiny_model.make(assets.catalogue(cloud))
    weights = tiny_model.weights_in(folder)
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
    return processes.start_server(config, key=server_key(cloud, deployment), log_path=log)


def _milliseconds(duration: str) -> int:
    match = re.fullmatch(r"PT(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?", duration)
    minutes, seconds = (match[1], match[2]) if match else (None, None)
    return max(100, int(1000 * (60 * int(minutes or 0) + float(seconds or 0))))


def resume_deployments(cloud: Cloud) -> None:
    """After a restart: deployments that were being made are made again, dead servers started."""
    for deployment in cloud.children("/subscriptions", DEPLOYMENT_KIND):
        running = [
            name
            for name, op in cloud.operations.items()
            if op.resource == deployment["id"] and op.status == "InProgress"
        ]
        server = processes.server_process(deployment)
        alive = server is not None and server.find() is not None
        ready = deployment["properties"]["provisioningState"] == "Succeeded"
        if running or (ready and not alive):
            name = running[0] if running else cloud.operate(deployment, by_itself=False).name
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
    stop_server_of(found)
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


# --- the front: checks key or token, chooses a deployment, passes the request on ---

_HOST = "{endpoint}.{region}.inference.ml.azure.com"
_DROPPED = {"transfer-encoding", "connection", "content-length", "server", "date"}
_NOT_PASSED = {"authorization", "host", "connection", "transfer-encoding", "content-length"}
_TEXT = {"Content-Type": "text/plain"}


@route("POST", _HOST, "/{path*}", audience="", locked=False)
def score(cloud: Cloud, request: Request) -> Reply:
    """Let a request through to the deployment that is to answer it."""
    with cloud.lock:
        cloud.settle()
        endpoint = _endpoint(cloud, request)
        if endpoint is None:
            return Reply(404, b"Specified endpoint could not be found", dict(_TEXT))
        if not _may_score(cloud, endpoint, request):
            return Reply(401, b"key_auth_access_denied", dict(_TEXT))
        deployment = _choose(cloud, endpoint, request)
        if deployment is None:
            return Reply(404, b"Specified traffic group could not be found", dict(_TEXT))
        server, key = deployment.get("_server"), server_key(cloud, deployment)
    if not server:
        headers = {**_TEXT, "ms-azureml-model-error-reason": "model_not_ready"}
        return Reply(424, b"no healthy upstream", headers)
    return _pass_on(request, int(server["port"]), key, deployment["name"])


get_score = route("GET", _HOST, "/{path*}", audience="", locked=False)(score)


def _endpoint(cloud: Cloud, request: Request) -> Json | None:
    wanted = (request.args["endpoint"].lower(), request.args["region"].lower())
    for doc in cloud.children("/subscriptions", KIND):
        if (doc["name"].lower(), doc["location"]) == wanted:
            return doc
    return None


def _may_score(cloud: Cloud, endpoint: Json, request: Request) -> bool:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        return False
    if endpoint["properties"]["authMode"] == "Key":
        keys = [key_of(cloud, endpoint, which) for which in endpoint["_keys"]]
        return any(hmac.compare_digest(value.encode(), key.encode()) for key in keys)
    claims = claims_of(cloud, value) if value.count(".") == 2 else None
    if endpoint["properties"]["authMode"] == "AADToken":
        return claims is not None and claims["aud"].rstrip("/") == "https://ml.azure.com"
    return claims is not None and claims["aud"] == endpoint["id"].lower()


def _choose(cloud: Cloud, endpoint: Json, request: Request) -> Json | None:
    """The deployment that the header names, or one drawn by its share of the traffic."""
    forced = request.headers.get("azureml-model-deployment")
    traffic = {n: s for n, s in (endpoint["properties"].get("traffic") or {}).items() if s > 0}
    if forced is None and not traffic:
        return None
    name = forced or random.choices(list(traffic), list(traffic.values()))[0]  # noqa: S311
    found = cloud.get(f"{endpoint['id']}/deployments/{name}")
    return found if found and found["type"] == DEPLOYMENT_KIND else None


def _pass_on(request: Request, port: int, key: str, deployment: str) -> Reply:
    headers = {k: v for k, v in request.headers.items() if k not in _NOT_PASSED}
    headers |= {"authorization": f"Bearer {key}", "azureml-model-deployment": deployment}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=200)
    try:
        connection.request(request.method, request.target, request.body, headers)
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException):
        connection.close()
        reason = {**_TEXT, "ms-azureml-model-error-reason": "model_not_ready"}
        return Reply(424, b"no healthy upstream", reason)
    kept = {k: v for k, v in answer.getheaders() if k.lower() not in _DROPPED}
    kept.setdefault("azureml-model-deployment", deployment)
    if "event-stream" in kept.get("content-type", kept.get("Content-Type", "")):
        return Reply(answer.status, _pieces(connection, answer), kept)
    body = answer.read()
    connection.close()
    return Reply(answer.status, body, kept)


def _pieces(
    connection: http.client.HTTPConnection, answer: http.client.HTTPResponse
) -> Iterator[bytes]:
    try:
        while piece := answer.read1(65536):
            yield piece
    finally:
        connection.close()
