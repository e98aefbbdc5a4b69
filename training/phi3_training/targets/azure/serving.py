"""The stage `deploy`: a deployment beside the old ones, asked through its header, then the traffic.

Reads the manifests `model` and `registration`; writes `endpoint`. The key stays in memory.
"""

from __future__ import annotations

import time

from phi3_tool import ChatReply, Phi3Client
from phi3_tool.entra import SCOPE
from phi3_tool.errors import (
    EndpointNotFoundError,
    EndpointTimeoutError,
    ModelError,
    Phi3Error,
    ServiceError,
    ThrottledError,
)

from ...console import ProgressCallback
from ...errors import StageError
from ...recipe import Recipe
from ...run import Run
from ..base import Access, Manifest
from .clients import Clients
from .endpoints import (
    delete_deployment,
    ensure_deployment,
    ensure_endpoint,
    move_traffic,
    read_log,
    shares,
)
from .failures import explained
from .names import deployment_name, endpoint_name
from .place import Made, noted, strike
from .sizes import find_size, refuse_retired
from .waiting import state_of

_SMOKE_SECONDS = 300.0
# What a deployment that has only just come up may say for a moment.
_SETTLING = (
    EndpointNotFoundError,
    EndpointTimeoutError,
    ModelError,
    ServiceError,
    ThrottledError,
)


def deploy(clients: Clients, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
    """Bring the registered model up; the manifest `endpoint`."""
    section = recipe.azure
    registration = run.require("registration", "phi3 register --on azure")
    route = run.require("model", "phi3 train --on azure")["route"]
    settings = section.endpoint
    refuse_retired(settings.instance_type, "azure.endpoint.instance_type")
    find_size(clients, settings.instance_type, "azure.endpoint.instance_type")
    name = endpoint_name(section, clients.workplace, run)
    deployment = deployment_name(section, registration)
    endpoint, how = ensure_endpoint(clients, section, run, name, progress)
    before = shares(endpoint.traffic)
    names = (name, deployment)
    ensure_deployment(clients, section, run, names, {**registration, "route": route}, progress)
    access = access_to(clients, name)
    reply = smoke(clients, access, names, recipe.ask, progress)
    move_traffic(clients, section, name, {deployment: 100}, progress)
    left = _prune(clients, recipe, run, names, progress)
    return {
        "target": "azure",
        "endpoint": access.endpoint,
        "endpoint_name": name,
        "deployment": deployment,
        "engine": f"{settings.instance_count} x {settings.instance_type}",
        "auth_mode": settings.auth_mode,
        "instance_type": settings.instance_type,
        "instance_count": settings.instance_count,
        "traffic": {deployment: 100},
        "traffic_before": before,
        "smoke": {"question": recipe.ask, "answer": reply.text, "request_id": reply.request_id},
        "choices": _choices(recipe, how, names, left),
    }


def _choices(recipe: Recipe, how: str, names: tuple[str, str], left: list[str]) -> list[str]:
    settings = recipe.azure.endpoint
    told = [
        f"the endpoint {names[0]} {'was there' if how == 'exists' else 'is new'}; it was asked "
        "through its header before it got the traffic",
        f"{settings.instance_count} x {settings.instance_type} bills until it is deleted: "
        "phi3 down --on azure",
    ]
    if left:
        others = ", ".join(left)
        told.append(f"without traffic, but billing: {others}; delete: phi3 down --on azure --idle")
    return told


def access_to(clients: Clients, name: str) -> Access:
    """URL and key of an endpoint; with Entra sign-in no key, but where a fresh token comes from."""
    with explained(f"Reading the endpoint {name}"):
        found = clients.ml.online_endpoints.get(name)
        url = str(found.scoring_uri or "")
        if not url:
            raise StageError(f"The endpoint {name} has no address yet: it is {state_of(found)}")
        if str(found.auth_mode).lower() == "aad_token":
            credential = clients.credential
            return Access(url, token_provider=lambda: str(credential.get_token(SCOPE).token))
        return Access(url, key=_key(clients, name))


def _key(clients: Clients, name: str) -> str:
    keys = clients.ml.online_endpoints.get_keys(name)
    key = getattr(keys, "primary_key", None) or getattr(keys, "access_token", None)
    if not key:
        raise StageError(f"The endpoint {name} gives no key; look at its authentication")
    return str(key)


def smoke(
    clients: Clients,
    access: Access,
    names: tuple[str, str],
    question: str,
    progress: ProgressCallback,
) -> ChatReply:
    """One answer of the new deployment, before any traffic is its. StageError without one."""
    ends = time.monotonic() + _SMOKE_SECONDS
    with access.client(deployment=names[1], max_retries=2, deadline=200.0) as client:
        while True:
            try:
                return _ask(client, question)
            except Phi3Error as error:
                settles = isinstance(error, _SETTLING) and error.status != 200
                if time.monotonic() > ends or not settles:
                    raise StageError(_no_answer(clients, names, error)) from None
                progress(0, 0, f"asking {names[1]}: not ready yet ({type(error).__name__})")
            time.sleep(clients.poll.interval)


def _ask(client: Phi3Client, question: str) -> ChatReply:
    messages = [{"role": "user", "content": question}]
    return client.chat(messages, temperature=0.0, max_new_tokens=64)


def _no_answer(clients: Clients, names: tuple[str, str], error: Phi3Error) -> str:
    text = read_log(clients, *names)
    shown = "".join(f"\n  {line}" for line in text.splitlines()[-20:])
    log = f"\nThe end of its log:{shown}" if shown else ""
    return (
        f"The deployment {names[1]} of {names[0]} is up but gives no answer, so it gets no "
        f"traffic: {error}{log}\nIt bills until it is deleted: phi3 down --on azure --idle"
    )


def _prune(
    clients: Clients, recipe: Recipe, run: Run, names: tuple[str, str], progress: ProgressCallback
) -> list[str]:
    """Delete the run's oldest deployments beyond those to keep; what is left without traffic."""
    section = recipe.azure
    with explained(f"Listing the deployments of {names[0]}"):
        there = {str(item.name) for item in clients.ml.online_deployments.list(names[0])}
    ours = [
        made.name
        for made in noted(run, "deployment")
        if made.parent == names[0] and made.name in there and made.name != names[1]
    ]
    surplus = max(0, len(ours) + 1 - section.endpoint.keep_deployments)
    for name in ours[:surplus]:
        delete_deployment(clients, section, names[0], name, progress)
        strike(run, Made("deployment", name, names[0]))
    return sorted(there - {names[1]} - set(ours[:surplus]))
