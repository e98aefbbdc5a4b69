"""The front of managed online endpoints: checks key or token, chooses a deployment, passes on."""

from __future__ import annotations

import hmac
import http.client
import random
from collections.abc import Iterator

from .cloud import Cloud, route
from .deployments import server_key
from .endpoints import DEPLOYMENT_KIND, KIND, key_of
from .signin import claims_of
from .wire import Json, Reply, Request

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
