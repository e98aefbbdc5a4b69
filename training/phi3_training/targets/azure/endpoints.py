"""Managed online endpoints: makes one, puts a deployment beside the others, moves traffic.

An endpoint that exists is never deleted to make room, and keeps its traffic until the new
deployment has answered.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ...console import ProgressCallback
from ...errors import StageError
from ...recipe_azure import AzureSection, EndpointSection, ProbeSection
from ...run import Run
from ..base import Manifest
from .clients import Clients, quiet_uploads
from .failures import explained, scrub
from .place import Made, note
from .removing import no_dots, remove
from .serving_code import SCRIPT, code_folder, environment
from .waiting import look, make, state_of

if TYPE_CHECKING:
    from azure.ai.ml.entities import ManagedOnlineDeployment, ManagedOnlineEndpoint, ProbeSettings

log = logging.getLogger(__name__)

OWNER_TAG = "phi3_run"
LOG_LINES = 80
_TRIES = 3


def ensure_endpoint(
    clients: Clients, section: AzureSection, run: Run, name: str, progress: ProgressCallback
) -> tuple[ManagedOnlineEndpoint, str]:
    """The endpoint, made if need be, and whether it was there. StageError if it cannot be used."""
    settings = section.endpoint
    found = look(lambda: clients.ml.online_endpoints.get(name), f"Looking for the endpoint {name}")
    if found is not None and state_of(found) == "succeeded":
        _refuse_other_auth(found, settings)
        return found, "exists"
    if found is None:
        note(run, Made("endpoint", name))
    entity = _endpoint(clients, section, run, name)
    with no_dots():
        made = make(
            f"Making the endpoint {name}",
            lambda: clients.ml.online_endpoints.begin_create_or_update(entity),
            lambda: clients.ml.online_endpoints.get(name),
            progress,
            limit=section.poll.deploy_timeout,
            pause=section.poll.interval,
        )
    return made, "made"


def _refuse_other_auth(found: Any, settings: EndpointSection) -> None:
    has = str(found.auth_mode).lower()
    if has != settings.auth_mode:
        raise StageError(
            f"The endpoint {found.name} exists and takes {has}, the recipe asks for "
            f"{settings.auth_mode}, which cannot be changed: set azure.endpoint.auth_mode={has}, "
            "or another azure.endpoint.name"
        )


def _endpoint(
    clients: Clients, section: AzureSection, run: Run, name: str
) -> ManagedOnlineEndpoint:
    from azure.ai.ml.entities import (
        IdentityConfiguration,
        ManagedIdentityConfiguration,
        ManagedOnlineEndpoint,
    )

    place = clients.workplace
    kind = "Microsoft.ManagedIdentity/userAssignedIdentities"
    identity = ManagedIdentityConfiguration(resource_id=place.resource_id(kind, place.identity))
    return ManagedOnlineEndpoint(
        name=name,
        auth_mode=section.endpoint.auth_mode,
        description=f"Phi-3 of the run {run.name}",
        tags={**section.tags, OWNER_TAG: run.name},
        identity=IdentityConfiguration(type="user_assigned", user_assigned_identities=[identity]),
    )


def ensure_deployment(
    clients: Clients, section: AzureSection, run: Run, names: tuple[str, str], model: Manifest,
    progress: ProgressCallback,
) -> str:  # fmt: skip
    """Make the deployment, with no traffic; "exists" or "made". StageError with its log's end."""
    endpoint, name = names
    read = lambda: clients.ml.online_deployments.get(name, endpoint)  # noqa: E731 - used twice
    found = look(read, f"Looking for the deployment {name}")
    if found is not None and state_of(found) == "succeeded" and _is_same(found, model):
        return "exists"
    if found is not None and state_of(found) == "failed":
        # A failed one bills and does not mend itself. It answers nobody: nothing is lost.
        delete_deployment(clients, section, endpoint, name, progress)
    note(run, Made("deployment", name, endpoint))
    entity = _deployment(section, run, names, model)
    try:
        with no_dots(), quiet_uploads():
            make(
                f"Making the deployment {name} (minutes; a GPU bills from now on)",
                lambda: clients.ml.online_deployments.begin_create_or_update(entity),
                read,
                progress,
                limit=section.poll.deploy_timeout,
                pause=section.poll.interval,
            )
    except StageError as error:
        raise StageError(_with_log(clients, run, names, str(error))) from None
    return "made"


def _is_same(found: Any, model: Manifest) -> bool:
    """Whether it serves that version of the model; for a deployment whose name the recipe sets."""
    wanted = f"/models/{model['model']}/versions/{model['model_version']}".lower()
    held = str(getattr(found, "model", "") or "").lower()
    return not held or held.endswith(
        (wanted, f":{model['model']}:{model['model_version']}".lower())
    )


def _deployment(
    section: AzureSection, run: Run, names: tuple[str, str], model: Manifest
) -> ManagedOnlineDeployment:
    from azure.ai.ml.entities import (
        CodeConfiguration,
        ManagedOnlineDeployment,
        OnlineRequestSettings,
    )

    settings = section.endpoint
    own: dict[str, Any] = {}
    if model["route"] == "job":
        own = {
            "code_configuration": CodeConfiguration(
                code=str(code_folder(run)), scoring_script=SCRIPT
            ),
            "environment": environment(section),
            "environment_variables": {
                "PHI3_CONCURRENCY": str(settings.max_concurrent_requests_per_instance),
                # Azure's server gives a worker this many seconds; ours waits as long as the door.
                "WORKER_TIMEOUT": str(settings.request_timeout_ms // 1000 + 30),
            },
        }
    return ManagedOnlineDeployment(
        name=names[1],
        endpoint_name=names[0],
        model=f"azureml:{model['model']}:{model['model_version']}",
        instance_type=settings.instance_type,
        instance_count=settings.instance_count,
        request_settings=OnlineRequestSettings(
            request_timeout_ms=settings.request_timeout_ms,
            max_concurrent_requests_per_instance=settings.max_concurrent_requests_per_instance,
        ),
        liveness_probe=_probe(settings.liveness_probe),
        readiness_probe=_probe(settings.readiness_probe),
        app_insights_enabled=settings.app_insights_enabled,
        tags={**section.tags, OWNER_TAG: run.name},
        **own,
    )


def _probe(settings: ProbeSection) -> ProbeSettings:
    from azure.ai.ml.entities import ProbeSettings

    return ProbeSettings(**settings.model_dump())


def _with_log(clients: Clients, run: Run, names: tuple[str, str], message: str) -> str:
    """The failure, the end of the container's log, and what bills now."""
    if not _stands(clients, names):
        return f"{message}\nNo deployment {names[1]} was made: nothing new bills."
    text = read_log(clients, *names)
    if text:
        run.file("azure", "deployment.log").write_text(text + "\n", encoding="utf-8")
        shown = "\n".join(f"  {line}" for line in text.splitlines()[-20:])
        message += (
            f"\nThe end of its log (more in {run.path / 'azure' / 'deployment.log'}):\n{shown}"
        )
    return (
        f"{message}\nThe deployment {names[1]} stays in {names[0]} as it is and bills until it is "
        f"deleted: phi3 down --on azure --failed --run {run.name}. `phi3 up` makes it anew."
    )


def _stands(clients: Clients, names: tuple[str, str]) -> bool:
    """Whether Azure has the deployment; where it does not tell, it may."""
    read = lambda: clients.ml.online_deployments.get(names[1], names[0])  # noqa: E731 - short
    try:
        return look(read, f"Looking for the deployment {names[1]}") is not None
    except StageError:
        return True


def read_log(clients: Clients, endpoint: str, name: str) -> str:
    """The container's last lines, without secrets; '' where there are none."""
    from azure.core.exceptions import AzureError

    parts = []
    for container in ("storage-initializer", "inference-server"):
        try:
            parts.append(
                clients.ml.online_deployments.get_logs(
                    name, endpoint, lines=LOG_LINES, container_type=container
                )
            )
        except AzureError as error:
            log.info("no log of the %s: %s", container, type(error).__name__)
    return scrub("\n".join(part.strip() for part in parts if part.strip()))


def move_traffic(
    clients: Clients, section: AzureSection, endpoint: str, wanted: Mapping[str, int],
    progress: ProgressCallback,
) -> bool:  # fmt: skip
    """Give each deployment its share. False where they have it already.

    Raises StageError for shares that Azure would refuse, before anything is sent.
    """
    for _ in range(_TRIES):
        with explained(f"Reading the endpoint {endpoint}"):
            found = clients.ml.online_endpoints.get(endpoint)
            there = [str(item.name) for item in clients.ml.online_deployments.list(endpoint)]
        check_traffic(wanted, there)
        if shares(found.traffic) == shares(wanted):
            return False
        found.traffic = {name: wanted.get(name, 0) for name in there}
        with no_dots():
            moved = make(
                f"Giving the traffic of {endpoint} to {', '.join(shares(wanted))}",
                partial(clients.ml.online_endpoints.begin_create_or_update, found),
                lambda: clients.ml.online_endpoints.get(endpoint),
                progress,
                limit=section.poll.deploy_timeout,
                pause=section.poll.interval,
            )
        # After a lost answer `make` only sees an endpoint that is well.
        if shares(moved.traffic) == shares(wanted):
            return True
    raise StageError(
        f"The endpoint {endpoint} does not take its traffic; it goes on with what it had. "
        "Type the same command again"
    )


def shares(traffic: Mapping[str, int] | None) -> dict[str, int]:
    """The deployments that get any traffic."""
    return {str(name): int(share) for name, share in (traffic or {}).items() if share}


def check_traffic(wanted: Mapping[str, int], there: list[str]) -> None:
    """Refuse shares of deployments that are not there, and sums other than 0 and 100."""
    missing = [name for name in shares(wanted) if name not in there]
    if missing:
        raise StageError(
            f"No deployment {', '.join(missing)} is there to take traffic; "
            f"deployments: {', '.join(there) or 'none'}"
        )
    total = sum(shares(wanted).values())
    if total not in (0, 100):
        raise StageError(f"The shares of traffic must add up to 100, not {total}")


def delete_deployment(
    clients: Clients, section: AzureSection, endpoint: str, name: str, progress: ProgressCallback
) -> None:
    """Delete a deployment that gets no traffic, and wait until it is gone."""
    remove(
        f"Deleting the deployment {name}",
        lambda: clients.ml.online_deployments.begin_delete(name, endpoint),
        lambda: clients.ml.online_deployments.get(name, endpoint),
        progress,
        limit=section.poll.delete_timeout,
        pause=section.poll.interval,
    )
