"""An Azure AI Search service of a run's own, for `rag.search.create=true`, with its deadline.

It bills by the hour from its creation to its end, empty or full. Its keys are off: whoever signs in
gets two roles on it, so that no admin key exists anywhere. The passages stay in the run's SQLite
file when it is deleted. Never run against live Azure.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import requests

from phi3_tool.azure_search import SearchService
from phi3_tool.errors import AuthenticationError, Phi3Error, ServiceError

from ...errors import StageError, UsageError
from ...progress import PlanLine, Progress, note
from ...rag.azure_search import MADE_BY, TIERS
from ...recipe.azure import NO_DEADLINE, AzureSection, duration_of
from .clients import ARM_SCOPE, Clients
from .failures import explained
from .operations import TRIES, delete, get_or_none
from .place import CREATED_BY, CREATED_BY_TAG, Place, made_by_phi3, resource_tags
from .resources import Body, Grant, ensure_grant, ensure_group, ensure_resource
from .workflow import (
    SAME_TIME,
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

TYPE = "Microsoft.Search/searchServices"
ROLES_ON_IT = ("Search Service Contributor", "Search Index Data Contributor")
#: Microsoft's public price list; needs no sign-in.
PRICES = "https://prices.azure.com/api/retail/prices"
PRICE_PAGE = "https://azure.microsoft.com/pricing/details/search/"
# Tiers as ARM spells them, and the names that the price list gives them.
_LISTED_TIERS = {
    "basic": ("basic",),
    "standard": ("standard s1", "s1", "standard"),
    "standard2": ("standard s2", "s2"),
    "standard3": ("standard s3", "s3"),
}
_HOURS_PER_MONTH = 730
# The service was renamed; the list has kept the old name.
_LISTED_AS = ("Azure Cognitive Search", "Azure AI Search")
_ROLE_SECONDS = 600.0  # a new role takes minutes to act
_PAUSE = 10.0


@dataclass(frozen=True)
class Wanted:
    """A service that is to be, or was, created."""

    name: str
    tier: str = "basic"
    deadline: str = "7d"  # after which it deletes itself, or none

    def id(self, place: Place) -> str:
        """Its ARM id."""
        return place.resource_id(TYPE, self.name)

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"https://{self.name}.search.windows.net"


def plan(wanted: Wanted, place: Place, *, prices: str = PRICES) -> list[PlanLine]:
    """What would be created, what it costs, and what ends it; changes nothing."""
    hour = price_of(wanted.tier, place.location, url=prices)
    if wanted.tier == "free":
        cost = "nothing: the free tier is shared and has 50 MB; one per subscription"
    elif hour is None:
        cost = f"price of the tier {wanted.tier} in {place.location} unknown: see {PRICE_PAGE}"
    else:
        cost = (
            f"{hour:.3f} USD per hour, {hour * _HOURS_PER_MONTH:,.0f} per month "
            f"(Microsoft's price list for {place.location})"
        )
    where = f"resource group {place.resource_group}, {place.location}"
    end = "phi3 rag down, or phi3 down --on azure"
    if wanted.deadline == NO_DEADLINE:
        end = f"WITHOUT a deadline (rag.search.deadline=none): {end}"
    else:
        hours = duration_of(wanted.deadline).total_seconds() / 3600
        most = "" if hour is None else f", at most {hour * hours:.2f} USD"
        end = (
            f"by itself after {wanted.deadline} (rag.search.deadline){most}, also with this "
            f"machine off; later: phi3 rag extend 2d; at once: {end}"
        )
    return [
        PlanLine("service", f"Azure AI Search {wanted.name}, tier {wanted.tier}, in {where}"),
        PlanLine("roles", f"yours on it: {', '.join(ROLES_ON_IT)}; it has no keys"),
        PlanLine("cost", f"{cost}; from creation to deletion, empty or full"),
        PlanLine("end", end),
    ]


def price_of(tier: str, location: str, *, url: str = PRICES) -> float | None:
    """US dollars per hour of a tier, 0 for the free one; None where that is not known."""
    return 0.0 if tier == "free" else usd_per_hour(tier, location, url=url)


def usd_per_hour(tier: str, location: str, *, url: str = PRICES) -> float | None:
    """The list price of one search unit; None where the list does not say or does not answer."""
    listed = " or ".join(f"serviceName eq '{name}'" for name in _LISTED_AS)
    where = f"({listed}) and armRegionName eq '{location}' and priceType eq 'Consumption'"
    try:
        # Seconds to connect and to read: `plan` shows this price, and must not hang on it.
        answer = requests.get(url, params={"$filter": where}, timeout=(3, 10))
        items = answer.json()["Items"] if answer.ok else []
        found = [
            float(item["retailPrice"])
            for item in items
            if str(item["skuName"]).casefold() in _LISTED_TIERS[tier]
            and item["unitOfMeasure"] == "1 Hour"
            and item.get("currencyCode", "USD") == "USD"
        ]
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None
    # More than one price under a name: rather none than a wrong one.
    return found[0] if len(set(found)) == 1 else None


def ensure_service(
    clients: Clients,
    wanted: Wanted,
    section: AzureSection,
    progress: Progress,
    *,
    service: SearchService | None = None,
    sleep: Callable[[float], None] = time.sleep,
    prices: str = PRICES,
) -> str:
    """Create what is missing and wait until this sign-in may use it; a sentence on its deadline.

    Raises StageError with the fix, also where the name is somebody else's.
    """
    tags = resource_tags(section)
    ensure_group(clients, tags, progress)
    ensure_resource(
        clients,
        f"search service {wanted.name}",
        wanted.id(clients.place),
        SEARCH_API,
        lambda: {
            "sku": {"name": wanted.tier},
            "properties": {
                # Replicas times partitions are the search units that are billed.
                "replicaCount": 1,
                "partitionCount": 1,
                "hostingMode": "default",
                "disableLocalAuth": True,  # no keys: roles alone
            },
        },
        tags,
        progress,
    )
    if wanted.deadline == NO_DEADLINE:
        sentence = "no deadline (rag.search.deadline=none): it bills until phi3 rag down"
    else:
        length = duration_of(wanted.deadline)
        hour = price_of(wanted.tier, clients.place.location, url=prices)
        arm_id = wanted.id(clients.place)
        sentence = hold_search_deadline(clients, arm_id, length, hour, progress)
    # Whoever signed in, as the token for ARM says by `oid`, and by `idtyp` where it is a program.
    token = clients.credential.get_token(ARM_SCOPE).token
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        principal = str(claims["oid"])
    except (IndexError, ValueError, KeyError, TypeError):
        raise StageError(
            "The sign-in does not say who signed in, so no role can be given; sign in with: "
            "az login, or use a service of yours: rag.search.endpoint=URL"
        ) from None
    kind = "ServicePrincipal" if claims.get("idtyp") == "app" else "User"
    for role in ROLES_ON_IT:
        ensure_grant(clients, Grant(role, wanted.id(clients.place), principal, kind))
    _wait_until_open(service or SearchService(wanted.endpoint), progress, sleep)
    return sentence


def _wait_until_open(
    service: SearchService, progress: Progress, sleep: Callable[[float], None]
) -> None:
    """Until the new roles act; StageError after ten minutes, or for what waiting does not cure."""
    started = time.monotonic()
    while True:
        try:
            service.call("GET", "/indexes")
        except (AuthenticationError, ServiceError) as error:
            waited = time.monotonic() - started
            if waited > _ROLE_SECONDS:
                raise StageError(
                    f"{service.endpoint} was created, but does not let you in after "
                    f"{waited:.0f} s: {error}. It bills; run the same command again, or delete it "
                    "with: phi3 rag down"
                ) from None
            note(progress, f"waiting for the new roles to act, {waited:.0f} s")
            sleep(_PAUSE)
        except Phi3Error as error:
            raise StageError(str(error)) from None
        else:
            return


def exists(clients: Clients, service_id: str) -> bool:
    """Whether it is still there: its deadline may have come."""
    read = partial(clients.resources.resources.get_by_id, service_id, api_version=SEARCH_API)
    return get_or_none(read, f"Looking for the search service {_name(service_id)}") is not None


@dataclass(frozen=True)
class Made:
    """A search service that phi3 made, with what it costs per hour and when it ends."""

    id: str
    tier: str
    location: str
    per_hour: float | None  # US dollars
    deadline: SearchDeadline

    def text(self) -> str:
        """One line for a person."""
        usd = "price unknown" if self.per_hour is None else f"{self.per_hour:.3f} USD per hour"
        if self.per_hour is None:
            usd += f": see {PRICE_PAGE}"
        at = self.deadline.at
        left = self.until_deadline()
        if at is None or left is None:
            ends = self.deadline.text()
        else:
            ends = f"at most {left:.2f} more until {shown(at)}; later: phi3 rag extend 2d"
        return f"Azure AI Search {_name(self.id)}: {self.tier}; {usd}, {ends}"

    def until_deadline(self) -> float | None:
        """US dollars until it deletes itself; None where that or the price is not known."""
        at = self.deadline.at
        if at is None or self.deadline.fault or self.per_hour is None:
            return None
        return self.per_hour * max(0.0, (at - utc_now()).total_seconds() / 3600)


def made_services(clients: Clients, *, group: str = "") -> list[Made]:
    """The services that phi3 made in the subscription, or in one resource group. StageError."""
    wanted = f"tagName eq '{CREATED_BY_TAG}' and tagValue eq '{CREATED_BY}'"
    resources = clients.resources.resources
    with explained("Looking for search services that phi3 made"):
        found = [
            resources.get_by_id(str(item.id), api_version=SEARCH_API)
            for item in resources.list(filter=wanted)
            if str(item.type).lower() == TYPE.lower()
            and (not group or f"/resourcegroups/{group}/".lower() in str(item.id).lower())
        ]
    return [_made(clients, item) for item in found]


def made_service(clients: Clients, service_id: str) -> Made | None:
    """One of them, by its ARM id; None where it is gone. StageError where it may not be read."""
    read = partial(clients.resources.resources.get_by_id, service_id, api_version=SEARCH_API)
    item = get_or_none(read, f"Looking for the search service {_name(service_id)}")
    return None if item is None else _made(clients, item)


def _made(clients: Clients, item: Any) -> Made:
    tier, location = str(getattr(item.sku, "name", None) or "basic"), str(item.location)
    per_hour = price_of(tier, location) if tier in TIERS else None
    deadline = read_search_deadline(clients, str(item.id))
    return Made(str(item.id), tier, location, per_hour, deadline)


def _name(service_id: str) -> str:
    return service_id.rsplit("/", 1)[-1]


def remove_service(
    clients: Clients,
    service_id: str,
    progress: Progress,
    *,
    ours: str | None,
    service: SearchService | None = None,
) -> str:
    """Delete the service, then its deadline; a line that says what was done.

    `ours` None: each index that phi3 made. Raises UsageError where the service is not phi3's, or
    has indexes besides ours.
    """
    name = _name(service_id)
    resources = clients.resources.resources
    read = partial(resources.get_by_id, service_id, api_version=SEARCH_API)
    found = get_or_none(read, f"Looking for the search service {name}")
    if found is None:
        remove_search_deadline(clients, service_id, progress)
        return f"Was deleted before: the search service {name}"
    if not made_by_phi3(found.tags):
        raise UsageError(f"The search service {name} was not made by phi3, so it was left alone")
    listed: dict[str, str] | None = None
    # None where it does not answer, yet or any more: its roles may be gone, or not act yet.
    with contextlib.suppress(AuthenticationError, ServiceError):
        answer = (service or SearchService(Wanted(name).endpoint)).call("GET", "/indexes") or {}
        indexes = answer.get("value", ())
        listed = {str(each.get("name")): str(each.get("description")) for each in indexes}
    if listed is None and ours is None:
        raise UsageError(
            f"The search service {name} does not tell its indexes, so others than phi3's may be in "
            f"it. Give yourself the role {SEARCH_KEEPER} on it and run the same command again, or: "
            "az search service delete"
        )
    others = [
        index
        for index, description in (listed or {}).items()
        if (index != ours if ours is not None else not description.startswith(MADE_BY))
    ]
    if others:
        raise UsageError(
            f"The search service {name} has other indexes, which would be deleted with it: "
            f"{', '.join(others)}. Delete them first, or the service: az search service delete"
        )
    start = partial(resources.begin_delete_by_id, service_id, api_version=SEARCH_API)
    poll = clients.poll
    doing = f"Deleting the search service {name}"
    delete(doing, start, read, progress, limit=poll.provision_timeout, pause=poll.interval)
    remove_search_deadline(clients, service_id, progress)  # not before: until then it still holds
    return f"Deleted the search service {name}"


# --- its deadline: a Logic App (workflow.py) whose identity has one role, on that service alone ---

SEARCH_API = "2025-05-01"
# "Azure built-in roles": everything on the service itself, nothing else.
SEARCH_KEEPER = "Search Service Contributor"
SEARCH_TAG, DEADLINE_TAG = "phi3-search", "phi3-deadline"
_TRIGGER = "deadline"


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
    """The ARM id of a service's workflow: in its group, whichever that is."""
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
        # Never earlier than it was: somebody may have extended it.
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
    # One that is due deletes within the hour, so it is counted from now.
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
    # The tags tell another machine whose it is; the time in them is for people in the portal.
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
        # After a lost answer `create` finds a workflow that is well, with the old time or new, so
        # only what Azure says now counts.
        found = read_search_deadline(clients, service_id)
        if found.at is not None and not found.fault and abs(found.at - at) <= SAME_TIME:
            return
        note(progress, f"{doing}: not there yet")
        time.sleep(clients.poll.interval)
    raise StageError(
        found.fault
        or f"Azure would delete it at {found.at}, not at {at}: is this machine's clock right?"
    )


def _is_ours(tags: Mapping[str, str] | None, service_id: str) -> bool:
    return made_by_phi3(tags) and (tags or {}).get(SEARCH_TAG) == service_id.rsplit("/", 1)[-1]
