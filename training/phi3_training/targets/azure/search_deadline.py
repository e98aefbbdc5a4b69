"""The deadline of a search service of phi3's own: a Logic App that deletes it (workflow.py).

Its identity has one role, on that service alone. The passages stay in the run's SQLite file. Never
verified on live Azure.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from ...errors import StageError
from ...progress import Progress, note
from .clients import Clients
from .operations import TRIES, get_or_none
from .place import made_by_phi3
from .resources import Body, Grant, ensure_grant
from .workflow import (
    WORKFLOW_TYPE,
    Dated,
    delete_workflow,
    find_workflow,
    iso,
    next_time,
    put_workflow,
    shown,
    utc_now,
    workflow_body,
)

SEARCH_API = "2025-05-01"
# "Azure built-in roles": everything on the service itself, nothing beside it.
SEARCH_KEEPER = "Search Service Contributor"
SEARCH_TAG, DEADLINE_TAG = "phi3-search", "phi3-deadline"
_TRIGGER = "deadline"
_SAME_TIME = dt.timedelta(minutes=5)


@dataclass(frozen=True)
class SearchDeadline:
    """When a service deletes itself. `at` None: never; `fault` says why it would not work."""

    at: dt.datetime | None
    fault: str = ""

    def text(self, now: dt.datetime | None = None) -> str:
        """A few words for a person."""
        if self.fault:
            return f"NO deadline holds: {self.fault}"
        if self.at is None:
            return "no deadline (set one: phi3 rag extend 7d)"
        return f"deletes itself at {shown(self.at, now)}; later: phi3 rag extend 2d"


def search_workflow_id(service_id: str) -> str:
    """The ARM id of a service's workflow: beside it, whatever group that is."""
    group, _, rest = service_id.partition("/providers/")
    return f"{group}/providers/{WORKFLOW_TYPE}/{rest.rsplit('/', 1)[-1]}-deadline"


def read_search_deadline(clients: Clients, service_id: str) -> SearchDeadline:
    """The service's deadline as Azure has it now. StageError where it may not be read."""
    arm_id = search_workflow_id(service_id)
    name = arm_id.rsplit("/", 1)[-1]
    workflow = find_workflow(clients, arm_id)
    if workflow is None:
        return SearchDeadline(None)
    if not _is_ours(workflow.tags, service_id):
        return SearchDeadline(None, f"{name} is not the workflow of this service")
    at = next_time(clients, arm_id, _TRIGGER)
    if str((workflow.properties or {}).get("state")).lower() != "enabled":
        return SearchDeadline(at, f"the workflow {name} is switched off")
    if at is None:
        return SearchDeadline(None, f"the workflow {name} does not run any more")
    grant = Grant(SEARCH_KEEPER, service_id, str(workflow.identity.principal_id))
    read = partial(clients.authorization.role_assignments.get, grant.scope, grant.name)
    if get_or_none(read, f"Reading the role of {name}") is None:
        return SearchDeadline(at, f"the workflow {name} has no role")
    return SearchDeadline(at)


def hold_search_deadline(
    clients: Clients,
    service_id: str,
    length: dt.timedelta,
    hourly: float | None,
    progress: Progress,
) -> str:
    """Have the service delete itself so long from now, or later where that is set already.

    One sentence about it, also where it cannot be made: nothing is raised. `hourly`: US dollars.
    """
    name = service_id.rsplit("/", 1)[-1]
    try:
        before = read_search_deadline(clients, service_id)
        at = max(utc_now() + length, before.at or utc_now())
        _put(clients, service_id, at, progress)
    except StageError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        return f"NO deadline holds for {name}: {reason}. It bills until: phi3 rag down"
    hours = (at - utc_now()).total_seconds() / 3600
    cost = "price unknown" if hourly is None else f"at most {hourly * hours:.2f} USD"
    return (
        f"deadline of {name}: {shown(at)}, {cost}; then it deletes itself, also with this machine "
        "off (never verified on live Azure). Later: phi3 rag extend 2d"
    )


def extend_search_deadline(
    clients: Clients, service_id: str, by: dt.timedelta, progress: Progress
) -> tuple[SearchDeadline, SearchDeadline]:
    """Move the deadline by so much, or set one that far from now; before and after.

    StageError where the service does not exist, is not phi3's, or Azure refuses.
    """
    before = read_search_deadline(clients, service_id)
    at = max(before.at or utc_now(), utc_now()) + by
    _put(clients, service_id, at, progress)
    return before, SearchDeadline(at)


def remove_search_deadline(clients: Clients, service_id: str, progress: Progress) -> bool:
    """Delete the service's workflow and its role; False where phi3 has none there."""
    arm_id = search_workflow_id(service_id)
    workflow = find_workflow(clients, arm_id)
    if workflow is None or not _is_ours(workflow.tags, service_id):
        return False
    grant = Grant(SEARCH_KEEPER, service_id, str(workflow.identity.principal_id))
    take = partial(clients.authorization.role_assignments.delete, grant.scope, grant.name)
    get_or_none(take, f"Removing the role {grant.label}")
    return delete_workflow(clients, arm_id, progress)


def _put(clients: Clients, service_id: str, at: dt.datetime, progress: Progress) -> None:
    """Make or move the workflow and give it its role. StageError, and none is left half-made."""
    arm_id, name = search_workflow_id(service_id), service_id.rsplit("/", 1)[-1]
    by_id = clients.resources.resources.get_by_id
    read = partial(by_id, service_id, api_version=SEARCH_API)
    service = get_or_none(read, f"Looking for the search service {name}")
    if service is None:
        raise StageError(f"the search service {name} does not exist (any more): phi3 rag index")
    if not made_by_phi3(service.tags):
        raise StageError(f"phi3 did not create the search service {name}: it gets no deadline")
    existing = find_workflow(clients, arm_id)
    if existing is not None and not _is_ours(existing.tags, service_id):
        raise StageError(f"there is a workflow {name}-deadline already that phi3 did not make")
    request = Dated("delete_service", _TRIGGER, at, "DELETE", service_id, SEARCH_API)
    own = {SEARCH_TAG: name, DEADLINE_TAG: iso(at)}
    region = str((existing or service).location)
    body = workflow_body([request], region, {**(service.tags or {}), **own})
    try:
        _send(clients, service_id, body, at, progress)
    except StageError:
        if existing is None:  # else it would be taken for a deadline
            with contextlib.suppress(StageError):
                remove_search_deadline(clients, service_id, progress)
        raise


def _send(
    clients: Clients, service_id: str, body: Body, at: dt.datetime, progress: Progress
) -> None:
    """Put the workflow and its role until Azure says the same time. StageError otherwise."""
    doing = f"Setting the deadline of {service_id.rsplit('/', 1)[-1]}"
    for _ in range(TRIES):
        workflow = put_workflow(clients, search_workflow_id(service_id), body, doing, progress)
        principal = str(workflow.identity.principal_id)
        ensure_grant(clients, Grant(SEARCH_KEEPER, service_id, principal))
        # After a lost answer `create` finds a workflow that is well, with the old time or new.
        found = read_search_deadline(clients, service_id)
        if found.at is not None and not found.fault and abs(found.at - at) <= _SAME_TIME:
            return
        note(progress, f"{doing}: not there yet")
        time.sleep(clients.poll.interval)
    raise StageError(
        found.fault
        or f"Azure would delete it at {found.at}, not at {at}: is this machine's clock right?"
    )


def _is_ours(tags: Mapping[str, str] | None, service_id: str) -> bool:
    return made_by_phi3(tags) and (tags or {}).get(SEARCH_TAG) == service_id.rsplit("/", 1)[-1]
