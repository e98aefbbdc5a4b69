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
from .cloud import Cloud, Operation, on_get, on_list, route, stamps
from .compute import DEPLOYMENT_KIND
from .processes import RehearsalError, stop_server_of
from .wire import ARM, ML, WORKSPACE, AzureError, Json, Reply, Request, asset_id, bad
from .workspaces import need_workspace

KIND = f"{ML}/workspaces/onlineEndpoints"
ENDPOINT = WORKSPACE + "/onlineEndpoints/{name}"
# 3 to 32 letters, digits and single dashes, a letter first.
_NAME = re.compile(r"[A-Za-z](?!.*--)[A-Za-z0-9-]{1,30}[A-Za-z0-9]")
KEYS = ("primary", "secondary")
# In these states every other change is a 409.
_CHANGING = ("Creating", "Updating", "Deleting")


@route("PUT", ARM, ENDPOINT)
def put_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Make an endpoint, or change its traffic and tags."""
    workspace, body = need_workspace(cloud, request), request.json()
    arm_id, name, given = request.id(ENDPOINT), request.args["name"], body.get("properties") or {}
    before, region = cloud.get(arm_id), workspace["location"]
    if not _NAME.fullmatch(name):
        raise bad(
            f"The endpoint name '{name}' is invalid: 3 to 32 letters, digits and single dashes, "
            "starting with a letter.",
            "InvalidEndpointName",
        )
    if given.get("authMode") == "AMLToken":
        raise AzureError(501, "NotRehearsed", "Endpoints with authMode AMLToken")
    if given.get("authMode") not in ("Key", "AADToken"):
        raise bad(f"authMode '{given.get('authMode')}' is not supported.", "ValidationError")
    if before and before["properties"]["authMode"] != given["authMode"]:
        raise bad("The authMode of an endpoint cannot be changed.", "ValidationError")
    for other in cloud.children("/subscriptions", KIND):  # the name is part of a public host name
        same = other["name"].lower() == name.lower() and other["location"] == region
        if same and other is not before:
            text = f"The endpoint name '{name}' is taken in region '{region}'."
            raise bad(text, "EndpointNameAlreadyExists")
    if before and before["properties"]["provisioningState"] in _CHANGING:
        raise AzureError(409, "Conflict", f"The endpoint '{name}' is being changed already.")
    traffic: dict[str, int] = given.get("traffic") or {}
    for deployment in traffic:
        if cloud.get(f"{arm_id}/deployments/{deployment}") is None:
            text = f"The traffic rule names the deployment '{deployment}', which does not exist."
            raise bad(text, "InvalidTraffic")
    # 0 in all is allowed: the deployments then answer by their header alone.
    if sum(traffic.values()) not in (0, 100):
        text = f"The traffic adds up to {sum(traffic.values())}; expected 0 or 100."
        raise bad(text, "InvalidTraffic")
    _check_mirror(cloud, arm_id, given.get("mirrorTraffic") or {}, traffic)
    users = (body.get("identity") or {}).get("userAssignedIdentities")
    own_identity: Json = {
        "type": "SystemAssigned",
        "principalId": str(uuid.uuid5(uuid.NAMESPACE_URL, arm_id.lower())),
        "tenantId": identity.TENANT,
    }
    if users:
        ids = identity.user_identities(cloud, users)
        own_identity = {"type": "UserAssigned", "userAssignedIdentities": ids}
    host = f"https://{name}.{region}.inference.ml.azure.com"
    document = {
        "location": region,
        "tags": body.get("tags") or {},
        "kind": "Managed",
        "identity": own_identity,
        "systemData": before["systemData"] if before else stamps(),
        "properties": {
            **given,
            "traffic": traffic,
            "publicNetworkAccess": given.get("publicNetworkAccess") or "Enabled",
            "scoringUri": f"{host}/score",
            "swaggerUri": f"{host}/swagger.json",
            "provisioningState": "Updating" if before else "Creating",
            "properties": given.get("properties") or {},
        },
    }
    if before:  # a change that fails changes nothing
        kept = before["properties"]
        document["_undo"] = {name: kept.get(name) or {} for name in ("traffic", "mirrorTraffic")}
    endpoint = cloud.put(arm_id, KIND, document)
    return cloud.accepted(endpoint, cloud.operate(endpoint), 200 if before else 201)


def _check_mirror(cloud: Cloud, arm_id: str, mirror: Json, traffic: dict[str, int]) -> None:
    """Refuse copies that Azure does not make (page "Perform safe rollout of new deployments")."""
    copied = {name: percent for name, percent in mirror.items() if percent}
    for name, percent in copied.items():
        if cloud.get(f"{arm_id}/deployments/{name}") is None:
            text = f"The mirror traffic names the deployment '{name}', which does not exist."
            raise bad(text, "InvalidTraffic")
        if percent > 50 or len(copied) > 1:
            text = "At most 50 % of the traffic can be mirrored, and to one deployment."
            raise bad(text, "InvalidTraffic")
        if traffic.get(name):
            text = f"The deployment '{name}' cannot have live and mirrored traffic at once."
            raise bad(text, "InvalidTraffic")


@route("DELETE", ARM, ENDPOINT)
def delete_endpoint(cloud: Cloud, request: Request) -> Reply:
    """Delete an endpoint with its deployments."""
    need_workspace(cloud, request)
    endpoint = cloud.get(request.id(ENDPOINT))
    if endpoint is None:
        return Reply(204)
    for deployment in cloud.children(endpoint["id"], DEPLOYMENT_KIND):
        stop_server_of(deployment)
    endpoint["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(endpoint, cloud.operate(endpoint, kind="delete"), 202, body=False)


@route("POST", ARM, ENDPOINT + "/listKeys")
def list_keys(cloud: Cloud, request: Request) -> Reply:
    """The two keys."""
    endpoint = need_endpoint(cloud, request)
    if endpoint["properties"]["authMode"] != "Key":
        raise bad("The endpoint does not use keys.", "UserError")
    return Reply(200, {f"{which}Key": key_of(cloud, endpoint, which) for which in KEYS})


def key_of(cloud: Cloud, endpoint: Json, which: str) -> str:
    """A key of an endpoint, `primary` or `secondary`: derived, so that it is stored nowhere."""
    return cloud.derive("endpoint", endpoint["id"], which)


def need_endpoint(cloud: Cloud, request: Request) -> Json:
    """The endpoint of the request. Raises AzureError (404)."""
    need_workspace(cloud, request)
    text = f"The endpoint '{request.args['name']}' was not found."
    return cloud.need(request.id(ENDPOINT), message=text)


on_get(ENDPOINT, need_endpoint)
on_list(WORKSPACE + "/onlineEndpoints", need_workspace, KIND)


# --- deployments ---

_DEPLOYMENT = ENDPOINT + "/deployments/{deployment}"
_DURATION = re.compile(r"PT(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?")  # ISO 8601, as the SDK writes it
# The longest request that an endpoint waits for (learn.microsoft.com/azure/machine-learning, page
# reference-yaml-deployment-managed-online). The default of 5 s is too short for a language model.
_DEFAULT_TIMEOUT, _LONGEST_SECONDS = "PT5S", 180.0


@route("PUT", ARM, _DEPLOYMENT)
def put_deployment(cloud: Cloud, request: Request) -> Reply:
    """Make or change a deployment: starts our server on the model."""
    endpoint, workspace = need_endpoint(cloud, request), need_workspace(cloud, request)
    arm_id, name, body = request.id(_DEPLOYMENT), request.args["deployment"], request.json()
    given = body.get("properties") or {}
    instances = int((body.get("sku") or {}).get("capacity") or 1)
    if not _NAME.fullmatch(name):
        raise bad(f"The deployment name '{name}' is invalid.", "InvalidDeploymentName")
    if endpoint["properties"]["provisioningState"] != "Succeeded":
        raise AzureError(409, "Conflict", f"The endpoint '{endpoint['name']}' is not ready.")
    before = cloud.get(arm_id)
    if before and before["properties"]["provisioningState"] in ("Creating", "Updating"):
        raise AzureError(409, "Conflict", f"The deployment '{name}' is being changed already.")
    _timeout_seconds(given)
    instance_type = _check_size(cloud, workspace, given, instances, before)
    folder = _model_folder(cloud, workspace, given)
    # Found only once the machine pulls image and model, so the PUT itself is accepted.
    error = _missing_role(cloud, workspace, endpoint)
    if before:
        stop_server_of(before)
    document = {
        "location": workspace["location"],
        "tags": body.get("tags") or {},
        "kind": "Managed",
        "sku": {"name": "Default", "capacity": instances},
        "systemData": before["systemData"] if before else stamps(),
        "properties": {
            **given,
            "scaleSettings": given.get("scaleSettings") or {"scaleType": "Default"},
            "endpointComputeType": "Managed",
            "instanceType": instance_type,
            "provisioningState": "Updating" if before else "Creating",
        },
        "_model": str(folder),
    }
    deployment = cloud.put(arm_id, DEPLOYMENT_KIND, document)
    operation = cloud.operate(deployment, by_itself=False)
    _bring_up(cloud, deployment, operation, error)
    return cloud.accepted(deployment, operation, 200 if before else 201)


def _timeout_seconds(given: Json) -> float:
    """The request timeout of a deployment. Raises AzureError."""
    text = str((given.get("requestSettings") or {}).get("requestTimeout") or _DEFAULT_TIMEOUT)
    match = _DURATION.fullmatch(text)
    seconds = 60 * int(match[1] or 0) + float(match[2] or 0) if match else 0.0
    if not match or seconds > _LONGEST_SECONDS:
        raise bad("The request timeout must be at most 180 seconds.", "BadArgument")
    return seconds


def _check_size(
    cloud: Cloud, workspace: Json, given: Json, instances: int, before: Json | None
) -> str:
    """The size in Azure's spelling, if it can be deployed and there is quota."""
    wanted = str(given.get("instanceType") or "Standard_F4s_v2")
    match = offers.find_size(wanted)
    if match is None or not match[1].deployable:
        text = f"The instance type '{wanted}' is not supported for managed online deployments."
        raise bad(text, "BadArgument")
    real, size = match
    need, location = compute.deployment_cores(size, instances), workspace["location"]
    taken = compute.used(cloud, location, size.family)
    old = offers.find_size(before["properties"]["instanceType"]) if before else None
    if before and old and old[1].family == size.family:
        taken -= compute.deployment_cores(old[1], before["sku"]["capacity"])
    limit = compute.limit_of(cloud, location, size.family)
    if taken + need > limit:
        message = (
            f"Not enough quota available for {real} in {location}. Current usage/limit: "
            f"{taken}/{limit}. Additional needed: {need}"
        )
        raise bad(message, "OutOfQuota", details=[{"code": "OutOfQuota", "message": message}])
    return real


def _model_folder(cloud: Cloud, workspace: Json, given: Json) -> Path:
    """Where the weights of the deployed model are. Raises AzureError."""
    asked = asset_id(given.get("model"))
    if not asked:
        raise bad("The deployment names no model.", "BadArgument")
    if asked.startswith("azureml://registries/"):
        model = offers.find_model(asked)
        if model is None or model[1].archived:
            raise bad(f"The model '{asked}' is archived or does not exist.", "BadArgument")
        return tiny_model.folder_in(assets.catalogue(cloud))
    doc = cloud.get(asked)
    if doc is None:
        raise bad(f"The model '{asked}' was not found.", "BadArgument")
    if doc["properties"].get("isArchived"):
        raise bad(f"The model '{asked}' is archived and cannot be deployed.", "BadArgument")
    environment, script = given.get("environmentId"), given.get("codeConfiguration") or {}
    for part in (environment, script.get("codeId")):
        if asset_id(part).startswith("/subscriptions/") and cloud.get(asset_id(part)) is None:
            raise bad(f"The asset '{part}' was not found.", "BadArgument")
    mlflow = "mlflow" in str(doc["properties"].get("modelType", "")).lower()
    if not mlflow and not (environment and script):
        raise bad("A custom model needs an environment and a scoring script.", "BadArgument")
    return assets.locate(cloud, workspace, doc["properties"]["modelUri"])


def _missing_role(cloud: Cloud, workspace: Json, endpoint: Json) -> Json | None:
    """What a user-assigned identity may not do; a system-assigned one gets its roles by itself."""
    users = (endpoint.get("identity") or {}).get("userAssignedIdentities") or {}
    properties = workspace["properties"]
    for user, item in users.items():
        for (roles, asked), scope in (
            (offers.PULLS_IMAGES, properties.get("containerRegistry")),
            (offers.READS_BLOBS, properties["storageAccount"]),
        ):
            if scope and not roles & identity.roles_of(cloud, item["principalId"], scope):
                name = user.rsplit("/", 1)[-1]
                message = f"The identity '{name}' lacks the role {asked} on '{scope}'."
                return {"code": "UserIdentityLacksPermission", "message": message}
    return None


def server_key(cloud: Cloud, deployment: Json) -> str:
    """The key between the front and the server; nobody else knows it."""
    return cloud.derive("server", deployment["id"])


def _log_file(cloud: Cloud, deployment: Json) -> Path:
    endpoint = str(deployment["id"]).split("/")[-3]
    return cloud.folder / "deployments" / endpoint / f"{deployment['name']}.log"


def _bring_up(cloud: Cloud, deployment: Json, operation: Operation, error: Json | None) -> None:
    """Start the server and end the operation, in a thread: loading a model takes seconds."""

    def work() -> None:
        log, failure, server = _log_file(cloud, deployment), error, None
        time.sleep(cloud.faults.slowness(deployment["id"], "deployment"))
        failure = failure or cloud.faults.failure(deployment["id"], "deployment")
        if failure is None:
            try:
                server = _start_server(cloud, deployment, log)
            except RehearsalError as problem:
                failure = {"code": "ResourceNotReady", "message": str(problem).splitlines()[0]}
        else:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"{failure['code']}: {failure['message']}\n", encoding="utf-8")
        with cloud.lock:
            if server and cloud.get(deployment["id"]) is not deployment:
                processes.stop_server(server.process)  # deleted or replaced in the meantime
            elif server:
                own = dataclasses.asdict(server.process)
                deployment["_server"] = {**own, "port": server.port}
            cloud.finish(operation.name, failure)
            cloud.save()

    threading.Thread(target=work, daemon=True).start()


def _start_server(cloud: Cloud, deployment: Json, log: Path) -> processes.Server:
    folder, properties = Path(deployment["_model"]), deployment["properties"]
    if folder == tiny_model.folder_in(assets.catalogue(cloud)):
        tiny_model.make(assets.catalogue(cloud))
    weights = tiny_model.weights_in(folder)
    if weights is None:
        raise RehearsalError(f"No weights were found in the model of '{deployment['name']}'.")
    limits = properties.get("requestSettings") or {}
    settings = {
        "engine": "transformers",
        "model_dir": str(weights),
        "num_threads": 1,
        "deployment": deployment["name"],
        "max_concurrent_requests_per_instance": int(
            limits.get("maxConcurrentRequestsPerInstance") or 1
        ),
        "request_timeout_ms": max(100, int(1000 * _timeout_seconds(properties))),
    }
    return processes.start_server(settings, key=server_key(cloud, deployment), log_path=log)


def resume_deployments(cloud: Cloud) -> None:
    """After a restart: start what was being created and the servers that died in the meantime."""
    for deployment in cloud.children("/subscriptions", DEPLOYMENT_KIND):
        unfinished = [
            operation
            for operation in cloud.operations.values()
            if operation.resource == deployment["id"] and operation.status == "InProgress"
        ]
        server = processes.server_process(deployment)
        alive = server is not None and server.find() is not None
        ready = deployment["properties"]["provisioningState"] == "Succeeded"
        if unfinished or (ready and not alive):
            operation = (unfinished or [cloud.operate(deployment, by_itself=False)])[0]
            _bring_up(cloud, deployment, operation, None)


@route("DELETE", ARM, _DEPLOYMENT)
def delete_deployment(cloud: Cloud, request: Request) -> Reply:
    """Delete a deployment that gets no traffic."""
    endpoint = need_endpoint(cloud, request)
    deployment = cloud.get(request.id(_DEPLOYMENT))
    if deployment is None:
        return Reply(204)
    name, traffic = deployment["name"], endpoint["properties"].get("traffic") or {}
    if traffic.get(name, 0) > 0:
        raise bad(
            f"The deployment '{name}' has {traffic[name]} % of the traffic; "
            "set it to 0 before deleting it.",
            "DeploymentHasTraffic",
        )
    stop_server_of(deployment)
    traffic.pop(name, None)
    deployment["properties"]["provisioningState"] = "Deleting"
    return cloud.accepted(deployment, cloud.operate(deployment, kind="delete"), 202, body=False)


@route("POST", ARM, _DEPLOYMENT + "/getLogs")
def get_logs(cloud: Cloud, request: Request) -> Reply:
    """The last lines of the server's log."""
    log = _log_file(cloud, _need_deployment(cloud, request))
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = text.splitlines()[-int(request.json().get("tail") or 50) :]
    return Reply(200, {"content": "\n".join(lines)})


def _need_deployment(cloud: Cloud, request: Request) -> Json:
    need_endpoint(cloud, request)
    text = f"The deployment '{request.args['deployment']}' was not found."
    return cloud.need(request.id(_DEPLOYMENT), message=text)


on_get(_DEPLOYMENT, _need_deployment)
on_list(ENDPOINT + "/deployments", need_endpoint, DEPLOYMENT_KIND)


# --- the front: checks key or token, chooses a deployment, passes the request on ---

_HOST = "{endpoint}.{region}.inference.ml.azure.com"
_BY_NAME = "azureml-model-deployment"  # the header that names a deployment, asked and answered
# Headers of one connection only; the others pass through.
_OF_THE_ANSWER = {"transfer-encoding", "connection", "content-length", "server", "date"}
_OF_THE_REQUEST = {"authorization", "host", "connection", "transfer-encoding", "content-length"}


def _plain(status: int, text: bytes, **headers: str) -> Reply:
    """An answer of the front itself: a line of plain text, no JSON."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, text, {"Content-Type": "text/plain", **more})


def _not_ready() -> Reply:
    # 424: the container did not answer with 200; here because there is none yet.
    return _plain(424, b"no healthy upstream", ms_azureml_model_error_reason="model_not_ready")


@route("POST", _HOST, "/{path*}", audience="", locked=False)
def score(cloud: Cloud, request: Request) -> Reply:
    """Let a request through to the deployment that is to answer it."""
    with cloud.lock:
        cloud.settle()
        wanted = (request.args["endpoint"].lower(), request.args["region"].lower())
        endpoints = cloud.children("/subscriptions", KIND)
        endpoint = next(
            (e for e in endpoints if (e["name"].lower(), e["location"]) == wanted), None
        )
        # Azure's gateway answers these in plain text, not as the resource manager's JSON.
        if endpoint is None:
            return _plain(404, b"Specified endpoint could not be found")
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if endpoint["properties"]["authMode"] == "Key":
            keys = [key_of(cloud, endpoint, which) for which in KEYS]
            is_known = any(hmac.compare_digest(value.encode(), key.encode()) for key in keys)
        else:
            claims = identity.claims_of(cloud, value) if value.count(".") == 2 else None
            audiences = identity.AUDIENCES["ml"]
            is_known = claims is not None and claims["aud"].rstrip("/") in audiences
        if scheme.lower() != "bearer" or not is_known:
            return _plain(401, b"key_auth_access_denied")
        # The deployment that the header names, or one drawn by its share of the traffic.
        forced, deployment = request.headers.get(_BY_NAME), None
        traffic = {n: s for n, s in (endpoint["properties"].get("traffic") or {}).items() if s > 0}
        if forced is not None or traffic:
            drawn = random.choices(list(traffic), list(traffic.values())) if traffic else []  # noqa: S311
            deployment = cloud.get(f"{endpoint['id']}/deployments/{forced or drawn[0]}")
        if deployment is None or deployment["type"] != DEPLOYMENT_KIND:
            return _plain(404, b"Specified traffic group could not be found")
        _copy(cloud, endpoint, request)
        server, key = deployment.get("_server"), server_key(cloud, deployment)
        share = (endpoint["properties"].get("traffic") or {}).get(deployment["name"], 0)
    named = _BY_NAME in request.headers
    instead = cloud.faults.answer(deployment["id"], share, named=named) if server else None
    if instead is not None:
        reply = Reply(*instead)
    elif server:
        reply = _pass_on(request, server["port"], key, deployment["name"])
    else:
        reply = _not_ready()
    reply.headers[_BY_NAME] = deployment["name"]  # also read by the journal, for the metrics
    return reply


get_score = route("GET", _HOST, "/{path*}", audience="", locked=False)(score)


def _copy(cloud: Cloud, endpoint: Json, request: Request) -> None:
    """Send a copy to the mirror, if it is its turn; nobody gets the answer."""
    mirror = endpoint["properties"].get("mirrorTraffic") or {}
    if _BY_NAME in request.headers:  # such a request is not mirrored
        return
    for name, percent in mirror.items():
        # Whoever is being created has no server yet, and gets no copy.
        deployment = cloud.get(f"{endpoint['id']}/deployments/{name}") or {}
        server = deployment.get("_server")
        if server and random.random() * 100 < percent:  # noqa: S311
            key = server_key(cloud, deployment)
            arguments = (request, server["port"], key, name)
            threading.Thread(target=_pass_on, args=arguments, daemon=True).start()


def _pass_on(request: Request, port: int, key: str, deployment: str) -> Reply:
    headers = {k: v for k, v in request.headers.items() if k not in _OF_THE_REQUEST}
    headers |= {"authorization": f"Bearer {key}", _BY_NAME: deployment}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LONGEST_SECONDS + 20)
    try:
        connection.request(request.method, request.target, request.body, headers)
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException):
        connection.close()
        return _not_ready()
    passed = {k.lower(): v for k, v in answer.getheaders() if k.lower() not in _OF_THE_ANSWER}
    if "event-stream" not in passed.get("content-type", ""):
        body = answer.read()
        connection.close()
        return Reply(answer.status, body, passed)

    def pieces() -> Iterator[bytes]:
        try:
            while piece := answer.read1(65536):
                yield piece
        finally:
            connection.close()

    return Reply(answer.status, pieces(), passed)
