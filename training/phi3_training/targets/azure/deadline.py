"""An endpoint's deadline: a Logic App on Azure that deletes it, whether or not this machine is on.

One workflow of the plan Consumption per endpoint, next to the workspace. From the deadline on it
asks Azure once an hour to delete that endpoint, for a week. Its identity has one role, on that
endpoint alone. Never verified on live Azure. Workflow and trigger: "Schedule and run recurring
workflows" and "Workflow Definition Language" (learn.microsoft.com/azure/logic-apps).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import StageError
from ...progress import Progress, note
from ...recipe.azure import NO_DEADLINE, AzureSection, duration_of
from ...run import Run
from .clients import ARM, Clients
from .failures import code_of
from .operations import TRIES, create, delete, get_or_none
from .place import JOB_RUN_TAG, RUN_TAG, Place, made_by_phi3, resource_tags
from .resources import ENDPOINT_KEEPER, Body, Grant, ensure_grant, register_provider

if TYPE_CHECKING:
    from azure.ai.ml.entities import OnlineEndpoint

WORKFLOW_TYPE = "Microsoft.Logic/workflows"
WORKFLOWS_API = "2019-05-01"
_ENDPOINTS_API = "2025-12-01"  # of the request that the workflow sends
_SCHEMA = (
    "https://schema.management.azure.com/providers/Microsoft.Logic/schemas/2016-06-01/"
    "workflowdefinition.json#"
)
TRIGGER = "deadline"
# A refused deletion (the endpoint is just being changed) is tried again each hour, for so long.
_TRIES_FOR = dt.timedelta(days=7)
# Azure's time of the next run may differ from what was asked by rounding alone; more means that
# this machine's clock is off, and that the endpoint would go at another time than is said here.
_SAME_TIME = dt.timedelta(minutes=5)
ENDPOINT_TAG, WORKSPACE_TAG, DEADLINE_TAG = "phi3-endpoint", "phi3-workspace", "phi3-deadline"
BUDGET = "phi3 azure budget 50 --mail YOU@EXAMPLE.COM"


@dataclass(frozen=True)
class Deadline:
    """When an endpoint deletes itself. `at` None: never; `fault` says why it would not work."""

    endpoint: str
    at: dt.datetime | None
    fault: str = ""

    @property
    def holds(self) -> bool:
        """Whether the endpoint will be gone by then, as far as one can see."""
        return self.at is not None and not self.fault

    def text(self, now: dt.datetime | None = None) -> str:
        """One line for a person."""
        if self.fault:
            return f"NO deadline holds: {self.fault}; it bills until: phi3 down --on azure"
        if self.at is None:
            return (
                "no deadline: it bills until phi3 down --on azure (set one: phi3 azure extend 8h)"
            )
        return f"deadline {shown(self.at, now)}, then it deletes itself (phi3 azure extend 4h)"


def shown(at: dt.datetime, now: dt.datetime | None = None) -> str:
    """`2026-11-28 18:00 UTC (in 3 h 20 min)`."""
    left = int((at - (now or utc_now())).total_seconds()) // 60
    text = f"{at:%Y-%m-%d %H:%M} UTC"
    if left < 1:
        return f"{text} (due now)"
    hours, minutes = divmod(left, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes and hours < 48 else ""]
    return f"{text} (in {' '.join(part for part in parts if part)})"


def utc_now() -> dt.datetime:
    """Now, in whole seconds: Azure's times have no more."""
    return dt.datetime.now(dt.timezone.utc).replace(microsecond=0)


def workflow_id(place: Place, endpoint: str) -> str:
    """The ARM id of an endpoint's workflow."""
    return place.resource_id(WORKFLOW_TYPE, f"{endpoint}-deadline")


def endpoint_id(place: Place, endpoint: str) -> str:
    """The ARM id of an endpoint of the workspace."""
    return f"{place.workspace_id()}/onlineEndpoints/{endpoint}"


def workflow_body(
    endpoint_arm_id: str, region: str, at: dt.datetime, tags: Mapping[str, str]
) -> Body:
    """The workflow as ARM takes it. ValueError for a deadline that is not ahead of us.

    Without a start time a recurrence runs as soon as it is saved, which would delete the endpoint.
    """
    if at <= utc_now():
        raise ValueError(f"the deadline {at} is past")
    recurrence = {
        "frequency": "Hour",
        "interval": 1,
        "startTime": _iso(at),
        "endTime": _iso(at + _TRIES_FOR),
        "timeZone": "UTC",
    }
    action = {
        "type": "Http",
        # Azure ML answers 202 with an address outside the endpoint. Logic Apps would poll it, get
        # a 403 (the role ends at the endpoint) and call a deletion that works a failure.
        "operationOptions": "DisableAsyncPattern",
        "inputs": {
            "method": "DELETE",
            "uri": f"{ARM}{endpoint_arm_id}?api-version={_ENDPOINTS_API}",
            "authentication": {
                "type": "ManagedServiceIdentity",
                "audience": "https://management.core.windows.net/",
            },
            "retryPolicy": {"type": "exponential", "count": 4, "interval": "PT30S"},
        },
    }
    definition = {
        "$schema": _SCHEMA,
        "contentVersion": "1.0.0.0",
        "triggers": {TRIGGER: {"type": "Recurrence", "recurrence": recurrence}},
        "actions": {"delete_endpoint": action},
        "outputs": {},
    }
    return {
        "location": region,
        "identity": {"type": "SystemAssigned"},
        "tags": {**tags, DEADLINE_TAG: _iso(at)},
        "properties": {"state": "Enabled", "definition": definition},
    }


def hold_deadline(
    clients: Clients, section: AzureSection, run: Run, endpoint: OnlineEndpoint, progress: Progress
) -> str:
    """See to the endpoint's deadline before anything at it bills; one sentence about it.

    It is never moved to an earlier time. Where it cannot be made, the sentence says that none holds
    and why, and nothing is raised: the deployment is the user's to make.
    """
    name, settings = str(endpoint.name), section.endpoint
    if RUN_TAG not in (endpoint.tags or {}):
        return (
            f"NO deadline holds: phi3 did not create the endpoint {name} and will not delete it. "
            f"What is deployed there bills until: phi3 down --on azure --run {run.name}"
        )
    if settings.deadline == NO_DEADLINE:
        try:
            remove_deadline(clients, name, progress)
        except StageError as error:
            return f"azure.endpoint.deadline=none, but one may still hold: {error}"
        return (
            f"no deadline (azure.endpoint.deadline=none): {name} bills until: phi3 down --on azure "
            f"--run {run.name}"
        )
    length = duration_of(settings.deadline)
    try:
        at = utc_now() + length
        before = read_deadline(clients, name)
        if before.holds and before.at is not None:
            at = max(at, before.at)
        _put(clients, resource_tags(section), run.name, name, at, progress)
    except StageError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        return (
            f"NO deadline holds for {name}: {reason}. It bills until: phi3 down --on azure --run "
            f"{run.name}. A budget mails you, a day late: {BUDGET} --run {run.name}"
        )
    price = clients.prices.hourly(settings.instance_type, clients.place.location)
    # A deletion that is refused once comes an hour later.
    hours = (at - utc_now()).total_seconds() / 3600
    cost = (
        f"this deployment costs at most {price.high * settings.instance_count * hours:.2f} USD, "
        if price
        else "price unknown, "
    )
    return (
        f"deadline of {name}: {shown(at)}; {cost}then it deletes itself, also with this machine "
        f"off (never verified on live Azure). Later: phi3 azure extend 4h --run {run.name}"
    )


def extend_deadline(
    clients: Clients,
    section: AzureSection,
    endpoint: str,
    by: dt.timedelta,
    progress: Progress,
) -> tuple[Deadline, Deadline]:
    """Move the deadline by so much, or set one that far from now; before and after.

    Raises StageError where the endpoint does not exist, is not phi3's, or Azure refuses; the
    deadline is then the one before.
    """
    found = get_or_none(
        lambda: clients.ml.online_endpoints.get(endpoint), f"Looking for the endpoint {endpoint}"
    )
    if found is None:
        raise StageError(f"The endpoint {endpoint} does not exist (any more): phi3 up --on azure")
    if RUN_TAG not in (found.tags or {}):
        raise StageError(f"phi3 did not create the endpoint {endpoint}: it gets no deadline")
    before = read_deadline(clients, endpoint)
    # A deadline that is due deletes within the hour, so it is counted from now.
    at = max(before.at or utc_now(), utc_now()) + by
    _put(clients, resource_tags(section), str(found.tags[RUN_TAG]), endpoint, at, progress)
    return before, Deadline(endpoint, at)


def read_deadline(clients: Clients, endpoint: str) -> Deadline:
    """The endpoint's deadline as Azure has it now. StageError where it may not be read."""
    place = clients.place
    workflow = _find(clients, endpoint)
    if workflow is None:
        return Deadline(endpoint, None)
    arm_id = workflow_id(place, endpoint)
    if not _is_ours(workflow, place, endpoint):
        return Deadline(endpoint, None, f"{_name(endpoint)} is not the workflow of this endpoint")
    properties = workflow.properties or {}
    trigger = get_or_none(
        partial(_by_id(clients), f"{arm_id}/triggers/{TRIGGER}", api_version=WORKFLOWS_API),
        f"Reading when {_name(endpoint)} runs",
    )
    at = _time(((trigger.properties if trigger else None) or {}).get("nextExecutionTime"))
    if str(properties.get("state")).lower() != "enabled":
        return Deadline(endpoint, at, f"the workflow {_name(endpoint)} is switched off")
    if at is None:
        return Deadline(endpoint, None, f"the workflow {_name(endpoint)} does not run any more")
    grant = _grant(place, endpoint, str(workflow.identity.principal_id))
    operations = clients.authorization.role_assignments
    read = partial(operations.get, grant.scope, grant.name)
    if get_or_none(read, f"Reading the role of {_name(endpoint)}") is None:
        return Deadline(endpoint, at, f"the workflow {_name(endpoint)} has no role: run deploy")
    return Deadline(endpoint, at)


def remove_deadline(clients: Clients, endpoint: str, progress: Progress) -> bool:
    """Delete the endpoint's workflow and its role; False where phi3 has none there."""
    workflow = _find(clients, endpoint)
    if workflow is None or not _is_ours(workflow, clients.place, endpoint):
        return False
    # The role goes with the endpoint, and would otherwise be an entry without a name.
    grant = _grant(clients.place, endpoint, str(workflow.identity.principal_id))
    take = partial(clients.authorization.role_assignments.delete, grant.scope, grant.name)
    get_or_none(take, f"Removing the role of {_name(endpoint)}")
    return delete_workflow(clients, workflow_id(clients.place, endpoint), progress)


def delete_workflow(clients: Clients, arm_id: str, progress: Progress) -> bool:
    """Delete a workflow by its id and wait until it is gone; False where there is none."""
    resources, poll = clients.resources.resources, clients.poll
    return delete(
        f"Deleting the workflow {arm_id.rsplit('/', 1)[-1]}",
        partial(resources.begin_delete_by_id, arm_id, api_version=WORKFLOWS_API),
        partial(resources.get_by_id, arm_id, api_version=WORKFLOWS_API),
        progress,
        limit=poll.delete_timeout,
        pause=poll.interval,
    )


def _put(
    clients: Clients,
    tags: Mapping[str, str],
    run: str,
    endpoint: str,
    at: dt.datetime,
    progress: Progress,
) -> None:
    """Make or move the workflow and give it its role. StageError, and none is left half-made."""
    place = clients.place
    existing = _find(clients, endpoint)
    if existing is not None and not _is_ours(existing, place, endpoint):
        raise StageError(
            f"there is a workflow {_name(endpoint)} already that phi3 did not make for it"
        )
    own = {JOB_RUN_TAG: run, ENDPOINT_TAG: endpoint, WORKSPACE_TAG: place.workspace_name}
    # Where it is moved without the run's recipe, the recipe's own tags stay.
    known = (existing.tags if existing is not None else None) or {}
    scope = endpoint_id(place, endpoint)
    body = workflow_body(scope, place.location, at, {**known, **tags, **own})
    try:
        _send(clients, endpoint, body, at, progress)
    except StageError:
        # A workflow that cannot delete would be taken for a deadline. One that held before stays.
        if existing is None:
            with contextlib.suppress(StageError):
                remove_deadline(clients, endpoint, progress)
        raise


def _send(clients: Clients, endpoint: str, body: Any, at: dt.datetime, progress: Progress) -> None:
    """Put the workflow and its role until Azure says the same time. StageError otherwise."""
    from azure.core.exceptions import HttpResponseError

    poll, resources = clients.poll, clients.resources.resources
    arm_id = workflow_id(clients.place, endpoint)
    put = partial(resources.begin_create_or_update_by_id, arm_id, body, api_version=WORKFLOWS_API)

    def start() -> object:
        try:
            return put()
        except HttpResponseError as error:
            if (code_of(error) or "").lower() != "missingsubscriptionregistration":
                raise
            register_provider(clients, WORKFLOW_TYPE.split("/")[0], progress)
            return put()

    doing = f"Setting the deadline of {endpoint}"
    for _ in range(TRIES):
        workflow: Any = create(
            doing,
            start,
            partial(resources.get_by_id, arm_id, api_version=WORKFLOWS_API),
            progress,
            limit=poll.provision_timeout,
            pause=poll.interval,
        )
        ensure_grant(clients, _grant(clients.place, endpoint, str(workflow.identity.principal_id)))
        # After a lost answer `create` finds a workflow that is well, with the old time or new.
        found = read_deadline(clients, endpoint)
        if found.at is not None and found.holds and abs(found.at - at) <= _SAME_TIME:
            return
        note(progress, f"{doing}: not there yet")
        time.sleep(poll.interval)
    raise StageError(
        found.fault
        or f"Azure would delete it at {found.at}, not at {at}: is this machine's clock right?"
    )


def _find(clients: Clients, endpoint: str) -> Any:
    arm_id = workflow_id(clients.place, endpoint)
    read = partial(_by_id(clients), arm_id, api_version=WORKFLOWS_API)
    return get_or_none(read, f"Looking for the workflow {_name(endpoint)}")


def _by_id(clients: Clients) -> Callable[..., Any]:
    return clients.resources.resources.get_by_id


def _is_ours(workflow: Any, place: Place, endpoint: str) -> bool:
    """Whether phi3 made it, for this endpoint: another workspace may have one of that name."""
    tags = workflow.tags or {}
    same = tags.get(WORKSPACE_TAG) == place.workspace_name and tags.get(ENDPOINT_TAG) == endpoint
    return made_by_phi3(tags) and same


def _grant(place: Place, endpoint: str, principal: str) -> Grant:
    return Grant(ENDPOINT_KEEPER, endpoint_id(place, endpoint), principal)


def _name(endpoint: str) -> str:
    return f"{endpoint}-deadline"


def _iso(at: dt.datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _time(text: object) -> dt.datetime | None:
    if not isinstance(text, str):
        return None
    # Azure writes seven digits of a second, which Python 3.10 does not read.
    whole = text.split(".")[0].removesuffix("Z")
    return dt.datetime.fromisoformat(whole).replace(tzinfo=dt.timezone.utc)
