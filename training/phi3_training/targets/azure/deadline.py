"""What deletes itself at an endpoint: a Logic App on Azure, whether or not this machine is on.

One workflow of the plan Consumption per endpoint, next to the workspace. It deletes the endpoint
at its deadline, deployments without traffic at their own times, and puts the traffic back where a
rollout was not ended (rollout.py). Its identity has one role, on that endpoint alone, and while a
rollout lasts the right to use the endpoint's identity. Never verified on live Azure.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import StageError
from ...progress import Progress, note
from ...recipe.azure import NO_DEADLINE, AzureSection, EndpointSection, duration_of
from ...run import Run
from .clients import Clients
from .failures import explained
from .operations import TRIES, get_or_none, state_of
from .place import JOB_RUN_TAG, RUN_TAG, Place, made_by_phi3, resource_tags
from .resources import ENDPOINT_KEEPER, IDENTITY, IDENTITY_USER, Body, Grant, ensure_grant
from .traffic import traffic_shares
from .workflow import (
    SAME_TIME,
    WORKFLOW_TYPE,
    Dated,
    delete_workflow,
    find_workflow,
    iso,
    next_time,
    put_workflow,
    requests_of,
    shown,
    utc_now,
    workflow_body,
)

if TYPE_CHECKING:
    from azure.ai.ml.entities import OnlineEndpoint

ENDPOINTS_API = "2025-12-01"  # of the requests that the workflow sends
TRIGGER = "deadline"
_REMOVALS, _ROLLOUT = "deployments", "rollout"  # the other triggers
_DELETE_ENDPOINT, _DELETE_DEPLOYMENT = "delete_endpoint", "delete_deployment_"
_PUT_BACK = "put_traffic_back"
_PUT_BACK_MINUTES = 15  # between two tries: meanwhile a bad deployment has traffic
ENDPOINT_TAG, WORKSPACE_TAG, DEADLINE_TAG = "phi3-endpoint", "phi3-workspace", "phi3-deadline"
BUDGET = "phi3 azure budget 50 --mail YOU@EXAMPLE.COM"


@dataclass(frozen=True)
class PutBack:
    """A PUT of the endpoint, sent from `at` on as long as the endpoint carries this tag."""

    at: dt.datetime
    tag: tuple[str, str]  # name and value
    body: Body

    def identities(self) -> list[str]:
        """The ids of the user-assigned identities that the body names."""
        return list((self.body.get("identity") or {}).get("userAssignedIdentities") or {})


@dataclass(frozen=True)
class Deadline:
    """When an endpoint deletes itself, and what else its workflow does before.

    `at` None: never; `fault` says why none of it would work. `removals`: when each deployment goes,
    if it has no traffic then.
    """

    endpoint: str
    at: dt.datetime | None
    fault: str = ""
    removals: Mapping[str, dt.datetime] = field(default_factory=dict)
    put_back: PutBack | None = None

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

    def lines(self, now: dt.datetime | None = None) -> list[str]:
        """All that it does, for people."""
        lines = [self.text(now)]
        if self.fault:
            return lines
        if self.put_back is not None:
            at = shown(self.put_back.at, now)
            lines.append(f"if the rollout is not ended by then, its traffic goes back at {at}")
        lines += [
            f"deployment {name}, if it has no traffic then, deletes itself at {shown(at, now)}"
            for name, at in sorted(self.ends().items(), key=lambda item: item[1])
        ]
        return lines

    def ends(self) -> dict[str, dt.datetime]:
        """When each deployment goes that deletes itself: at its time, or with the endpoint."""
        at = self.at
        return {name: min(own, at) if at else own for name, own in self.removals.items()}

    def end_of(self, deployment: str) -> dt.datetime | None:
        """When a deployment without traffic is gone; None: never, as far as one can see."""
        return None if self.fault else self.ends().get(deployment, self.at)


def workflow_id(place: Place, endpoint: str) -> str:
    """The ARM id of an endpoint's workflow."""
    return place.resource_id(WORKFLOW_TYPE, f"{endpoint}-deadline")


def endpoint_id(place: Place, endpoint: str) -> str:
    """The ARM id of an endpoint of the workspace."""
    return f"{place.workspace_id()}/onlineEndpoints/{endpoint}"


def requests_for(place: Place, wanted: Deadline) -> list[Dated]:
    """What the workflow is to send, in the order in which it sends what is due at the same time."""
    scope = endpoint_id(place, wanted.endpoint)
    send = partial(Dated, api_version=ENDPOINTS_API)
    requests = []
    if wanted.put_back is not None:
        back = wanted.put_back
        requests.append(
            send(
                *(_PUT_BACK, _ROLLOUT, back.at, "PUT", scope),
                body=back.body,
                only_if=back.tag,
                minutes=_PUT_BACK_MINUTES,
            )
        )
    requests += [
        send(f"{_DELETE_DEPLOYMENT}{name}", _REMOVALS, at, "DELETE", f"{scope}/deployments/{name}")
        for name, at in sorted(wanted.removals.items())
    ]
    # Last: while it is being deleted, Azure refuses everything else.
    if wanted.at is not None:
        requests.append(send(_DELETE_ENDPOINT, TRIGGER, wanted.at, "DELETE", scope))
    return requests


def hold_deadline(
    clients: Clients,
    section: AzureSection,
    run: Run,
    endpoint: OnlineEndpoint,
    progress: Progress,
    coming: str = "",
) -> str:
    """See to the endpoint's deadline before anything at it bills; what to tell of it.

    `coming`: the deployment that is to be created; it goes by itself where it gets no traffic. The
    deadline is never moved to an earlier time. Where it cannot be made, the sentence says that none
    holds and why, and nothing is raised: the deployment is the user's to make.
    """
    name, settings = str(endpoint.name), section.endpoint
    if RUN_TAG not in (endpoint.tags or {}):
        return (
            f"NO deadline holds: phi3 did not create the endpoint {name} and will not delete it. "
            f"What is deployed there bills until: phi3 down --on azure --run {run.name}"
        )
    try:
        before = read_deadline(clients, name)
        at = None
        # Never earlier than it was: somebody may have extended it.
        if settings.deadline != NO_DEADLINE:
            at = utc_now() + duration_of(settings.deadline)
            at = max(at, before.at) if before.holds and before.at is not None else at
        removals = _removals(clients, section, run, before, coming=coming)
        wanted = Deadline(name, at, removals=removals)
        _put(clients, resource_tags(section), run.name, wanted, progress)
    except StageError as error:
        reason = _plain(error)
        if settings.deadline == NO_DEADLINE:
            return f"azure.endpoint.deadline=none, but one may still hold: {reason}"
        return (
            f"NO deadline holds for {name}: {reason}. It bills until: phi3 down --on azure --run "
            f"{run.name}. A budget mails you, a day late: {BUDGET} --run {run.name}"
        )
    price = clients.prices.hourly(settings.instance_type, clients.place.location)
    hourly = price.high * settings.instance_count if price else None
    rule = rule_text(settings, hourly)
    rule = f"\n{rule}" if rule else ""
    if at is None:
        return (
            f"no deadline (azure.endpoint.deadline=none): {name} bills until: phi3 down --on azure "
            f"--run {run.name}{rule}"
        )
    # A deletion that is refused once comes an hour later.
    hours = (at - utc_now()).total_seconds() / 3600
    cost = (
        "price unknown, "
        if hourly is None
        else f"this deployment costs at most {hourly * hours:.2f} USD, "
    )
    return (
        f"deadline of {name}: {shown(at)}; {cost}then it deletes itself, also with this machine "
        f"off (never verified on live Azure). Later: phi3 azure extend 4h --run {run.name}{rule}"
    )


def settle_removals(
    clients: Clients,
    section: AzureSection,
    run: Run,
    endpoint: str,
    progress: Progress,
    *,
    refused: str = "",
) -> list[str]:
    """After a deployment or a change of its traffic: write down what goes by itself now.

    Ends what a rollout has left in the workflow. What to tell of it; nothing is raised, for the
    traffic is as it was asked for. `refused`: a new deployment that did not take over.
    """
    try:
        if find_workflow(clients, workflow_id(clients.place, endpoint)) is None:
            return []
        before = read_deadline(clients, endpoint)
        removals = _removals(clients, section, run, before, refused=refused)
        wanted = replace(before, fault="", removals=removals, put_back=None)
        if wanted != before:
            _put(clients, resource_tags(section), run.name, wanted, progress)
    except StageError as error:
        return [
            f"the workflow {_name(endpoint)} could not be changed: {_plain(error)}. It cannot undo "
            "this, because the endpoint's tag of the rollout is gone; what it deletes and when is "
            f"as before: phi3 status --on azure --run {run.name}"
        ]
    return [
        f"{name} has no traffic and deletes itself at {shown(at)}"
        for name, at in wanted.ends().items()
    ]


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
    after = replace(before, at=at, fault="")
    _put(clients, resource_tags(section), str(found.tags[RUN_TAG]), after, progress)
    return before, after


def read_deadline(clients: Clients, endpoint: str) -> Deadline:
    """What the endpoint's workflow does, as Azure has it now. StageError where it may not be read.

    A put-back without the right to use the endpoint's identity is left out: it could do nothing.
    """
    place = clients.place
    arm_id = workflow_id(place, endpoint)
    workflow = find_workflow(clients, arm_id)
    if workflow is None:
        return Deadline(endpoint, None)
    if not _is_ours(workflow, place, endpoint):
        return Deadline(endpoint, None, f"{_name(endpoint)} is not the workflow of this endpoint")
    found = _as_deadline(endpoint, workflow)
    # Anybody may switch a workflow off in the portal; it then looks as before.
    if str((workflow.properties or {}).get("state")).lower() != "enabled":
        found = replace(found, fault=f"the workflow {_name(endpoint)} is switched off")
    if TRIGGER in ((workflow.properties or {}).get("definition") or {}).get("triggers", {}):
        found = replace(found, at=next_time(clients, arm_id, TRIGGER))
        if found.at is None and not found.fault:
            fault = f"the workflow {_name(endpoint)} does not run any more"
            return Deadline(endpoint, None, fault)
    # Without the role the workflow fires and is refused, every hour, and nobody hears of it.
    principal = str(workflow.identity.principal_id)
    if not _has(clients, _keeper(place, endpoint, principal)) and not found.fault:
        found = replace(found, fault=f"the workflow {_name(endpoint)} has no role: run deploy")
    uses = [] if found.put_back is None else _users(found.put_back.identities(), principal)
    return found if all(_has(clients, grant) for grant in uses) else replace(found, put_back=None)


def keep_put_back(
    clients: Clients,
    section: AzureSection,
    run: Run,
    endpoint: str,
    back: PutBack,
    progress: Progress,
) -> None:
    """Have the workflow put the traffic back from a time on. StageError where it will not."""
    before = read_deadline(clients, endpoint)
    wanted = replace(before, fault="", put_back=back)
    _put(clients, resource_tags(section), run.name, wanted, progress)


def remove_deadline(clients: Clients, endpoint: str, progress: Progress) -> bool:
    """Delete the endpoint's workflow and its roles; False where phi3 has none there."""
    place = clients.place
    workflow = find_workflow(clients, workflow_id(place, endpoint))
    if workflow is None or not _is_ours(workflow, place, endpoint):
        return False
    # They would otherwise be entries without a name.
    principal = str(workflow.identity.principal_id)
    back = _as_deadline(endpoint, workflow).put_back
    users = _users({IDENTITY.id(place), *(back.identities() if back else ())}, principal)
    for grant in (_keeper(place, endpoint, principal), *users):
        _revoke(clients, grant)
    return delete_workflow(clients, workflow_id(place, endpoint), progress)


def _removals(
    clients: Clients,
    section: AzureSection,
    run: Run,
    before: Deadline,
    *,
    coming: str = "",
    refused: str = "",
) -> dict[str, dt.datetime]:
    """The times of the endpoint's deployments without traffic, as Azure has them now."""
    ml, name = clients.ml, before.endpoint
    with explained(f"Listing the deployments of {name}"):
        endpoint = ml.online_endpoints.get(name)
        listed = list(ml.online_deployments.list(name))
    # Copies of requests count as traffic: a deployment that gets them is being tried out.
    live = (traffic_shares(endpoint.traffic), traffic_shares(endpoint.mirror_traffic))
    used = frozenset(name for shares in live for name in shares)
    found = Now(listed, used, coming, refused)
    return removals_of(section, run.name, found, before.removals, utc_now())


def _put(
    clients: Clients, tags: Mapping[str, str], run: str, wanted: Deadline, progress: Progress
) -> None:
    """Make or change the workflow and give it its roles. StageError, and none is left half-made."""
    place, endpoint = clients.place, wanted.endpoint
    existing = find_workflow(clients, workflow_id(place, endpoint))
    if existing is not None and not _is_ours(existing, place, endpoint):
        raise StageError(
            f"there is a workflow {_name(endpoint)} already that phi3 did not make for it"
        )
    requests = requests_for(place, wanted)
    if not requests:
        remove_deadline(clients, endpoint, progress)
        return
    own = {
        JOB_RUN_TAG: run,
        ENDPOINT_TAG: endpoint,
        WORKSPACE_TAG: place.workspace_name,
        DEADLINE_TAG: NO_DEADLINE if wanted.at is None else iso(wanted.at),
    }
    # Where it is changed without the run's recipe, the recipe's own tags stay.
    known = (existing.tags if existing is not None else None) or {}
    body = workflow_body(requests, place.location, {**known, **tags, **own})
    try:
        _send(clients, body, wanted, progress)
    except StageError:
        # A workflow that cannot delete would be taken for a deadline. One that held before stays.
        if existing is None:
            with contextlib.suppress(StageError):
                remove_deadline(clients, endpoint, progress)
        raise
    old = None if existing is None else _as_deadline(endpoint, existing).put_back
    if old is not None and wanted.put_back is None:
        # What is left of it allows to give that identity to this endpoint, which has it already.
        with contextlib.suppress(StageError):
            for grant in _users(old.identities(), str(existing.identity.principal_id)):
                _revoke(clients, grant)


def _send(clients: Clients, body: Body, wanted: Deadline, progress: Progress) -> None:
    """Put the workflow and its roles until Azure says the same. StageError otherwise."""
    place, endpoint = clients.place, wanted.endpoint
    doing = f"Setting the deadline of {endpoint}"
    for _ in range(TRIES):
        workflow = put_workflow(clients, workflow_id(place, endpoint), body, doing, progress)
        principal = str(workflow.identity.principal_id)
        users = [] if wanted.put_back is None else _users(wanted.put_back.identities(), principal)
        for grant in (_keeper(place, endpoint, principal), *users):
            ensure_grant(clients, grant)
        # After a lost answer `create` finds a workflow that is well, as it was before or as wanted.
        found = read_deadline(clients, endpoint)
        as_wanted = found
        if (
            found.at is not None
            and wanted.at is not None
            and abs(found.at - wanted.at) <= SAME_TIME
        ):
            as_wanted = replace(as_wanted, at=wanted.at)
        if found.put_back is not None and wanted.put_back is not None:
            # A body may come back in other words than it went, such as without a null.
            back = replace(found.put_back, body=wanted.put_back.body)
            as_wanted = replace(as_wanted, put_back=back)
        if as_wanted == wanted:
            return
        note(progress, f"{doing}: not there yet")
        time.sleep(clients.poll.interval)
    if not found.fault and found.at == wanted.at:
        raise StageError(f"{doing}: Azure does not have it as it was sent")
    raise StageError(
        found.fault
        or f"Azure would delete it at {found.at}, not at {wanted.at}: is this machine's clock "
        "right?"
    )


def _as_deadline(endpoint: str, workflow: Any) -> Deadline:
    """What a workflow's own text says, but for the deadline: that Azure's trigger tells."""
    found = Deadline(endpoint, None)
    removals: dict[str, dt.datetime] = {}
    for request in requests_of(workflow):
        if request.name.startswith(_DELETE_DEPLOYMENT):
            removals[request.name.removeprefix(_DELETE_DEPLOYMENT)] = request.at
        elif request.name == _PUT_BACK and request.body is not None and request.only_if:
            found = replace(found, put_back=PutBack(request.at, request.only_if, request.body))
    return replace(found, removals=removals)


def _is_ours(workflow: Any, place: Place, endpoint: str) -> bool:
    """Whether phi3 made it, for this endpoint: another workspace may have one of that name."""
    tags = workflow.tags or {}
    same = tags.get(WORKSPACE_TAG) == place.workspace_name and tags.get(ENDPOINT_TAG) == endpoint
    return made_by_phi3(tags) and same


def _keeper(place: Place, endpoint: str, principal: str) -> Grant:
    return Grant(ENDPOINT_KEEPER, endpoint_id(place, endpoint), principal)


def _users(identities: Iterable[str], principal: str) -> list[Grant]:
    """The right to give an endpoint the identities that it has: without it Azure refuses a PUT."""
    return [Grant(IDENTITY_USER, arm_id, principal) for arm_id in identities]


def _has(clients: Clients, grant: Grant) -> bool:
    read = partial(clients.authorization.role_assignments.get, grant.scope, grant.name)
    return get_or_none(read, f"Reading the role {grant.label}") is not None


def _revoke(clients: Clients, grant: Grant) -> None:
    take = partial(clients.authorization.role_assignments.delete, grant.scope, grant.name)
    get_or_none(take, f"Removing the role {grant.label}")


def _name(endpoint: str) -> str:
    return f"{endpoint}-deadline"


def _plain(error: StageError) -> str:
    return " ".join(str(error).split()).rstrip(".")


# --- which deployments without traffic delete themselves, and when ---
# Azure refuses to delete a deployment that has traffic, so a time that is out of date takes
# nobody's answers away.

# What else may pass before a new deployment has all of the traffic: questions, changes of traffic.
_BESIDE = dt.timedelta(hours=1)


class Tagged(Protocol):
    """What is used of the SDK's deployment."""

    name: str | None
    tags: dict[str, str] | None


@dataclass(frozen=True)
class Now:
    """An endpoint's deployments as they are; `used`: those that have traffic or get copies of it.

    `coming` is about to be created; `refused` failed, or was worse than the one that it was to
    replace.
    """

    deployments: Iterable[Tagged]
    used: frozenset[str]
    coming: str = ""
    refused: str = ""


def removals_of(
    section: AzureSection, run: str, found: Now, known: Mapping[str, dt.datetime], now: dt.datetime
) -> dict[str, dt.datetime]:
    """When each of the run's deployments without traffic goes; `known`: the times until now.

    One that waits for a rollback gets a new time with each change, one that failed keeps it.
    """
    settings = section.endpoint
    failed_after = length(settings.remove_failed_after)
    unused_after = length(settings.remove_unused_after)
    times: dict[str, dt.datetime] = {}
    for item in found.deployments:
        name = str(item.name)
        if name in found.used or name == found.coming:
            continue
        if (item.tags or {}).get(RUN_TAG) != run:
            if name in known:  # another run's, which set its time
                times[name] = known[name]
        elif name == found.refused or state_of(item) in ("failed", "canceled"):
            if failed_after is not None:
                at = now + failed_after
                times[name] = at if name == found.refused else min(at, known.get(name, at))
        elif unused_after is not None:
            at = now + unused_after
            times[name] = max(at, known.get(name, at))
    if found.coming and found.coming not in found.used and failed_after is not None:
        # Before it exists, so that it also goes where nobody is left to see it fail.
        times[found.coming] = now + longest_rollout(section) + failed_after
    return times


def longest_rollout(section: AzureSection) -> dt.timedelta:
    """How long a new deployment may take until it has all of the traffic."""
    looks = len(section.rollout.steps) + bool(section.rollout.mirror)
    seconds = section.poll.deploy_timeout + 60 * section.rollout.minutes * looks
    return dt.timedelta(seconds=int(seconds)) + _BESIDE


def length(after: str) -> dt.timedelta | None:
    """The recipe's duration; None for `none`."""
    return None if after == NO_DEADLINE else duration_of(after)


def rule_text(settings: EndpointSection, hourly: float | None) -> str:
    """What the recipe says of it, for people; empty where nothing is removed.

    `hourly`: what a deployment costs per hour in US dollars, where that is known.
    """
    parts = []
    for what, after, key in (
        ("one that fails or is worse", settings.remove_failed_after, "remove_failed_after"),
        ("an old one", settings.remove_unused_after, "remove_unused_after"),
    ):
        time, deadline = length(after), length(settings.deadline)
        if time is not None:
            later = deadline is not None and time > deadline
            hours = (deadline if later and deadline else time).total_seconds() / 3600
            usd = "" if hourly is None else f", {hourly * hours:.2f} USD"
            when = f"after {after}{' or at the deadline' if later else ''}"
            parts.append(f"{what} {when}{usd} (azure.endpoint.{key})")
    if not parts:
        return ""
    return f"a deployment without traffic deletes itself: {'; '.join(parts)}"
