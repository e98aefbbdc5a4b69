"""An Azure AI Search service of a run's own, for `rag.search.create=true`: plan, create, delete.

It bills by the hour from its creation to its end, empty or full. Its keys are off: whoever signs in
gets two roles on it, so that no admin key exists anywhere. Never run against live Azure.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import requests

from phi3_tool.azure_search import SearchService
from phi3_tool.errors import AuthenticationError, Phi3Error, ServiceError

from ...errors import StageError, UsageError
from ...progress import PlanLine, Progress, note
from ...recipe.azure import AzureSection
from .clients import ARM_SCOPE, Clients
from .operations import delete, get_or_none
from .place import Place, made_by_phi3, resource_tags
from .resources import Grant, ensure_grant, ensure_group, ensure_resource

TYPE, API = "Microsoft.Search/searchServices", "2025-05-01"
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

    def id(self, place: Place) -> str:
        """Its ARM id."""
        return place.resource_id(TYPE, self.name)

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"https://{self.name}.search.windows.net"


def plan(wanted: Wanted, place: Place, *, prices: str = PRICES) -> list[PlanLine]:
    """What would be created, what it costs, and what ends it; changes nothing."""
    hour = 0.0 if wanted.tier == "free" else usd_per_hour(wanted.tier, place.location, url=prices)
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
    return [
        PlanLine("service", f"Azure AI Search {wanted.name}, tier {wanted.tier}, in {where}"),
        PlanLine("roles", f"yours on it: {', '.join(ROLES_ON_IT)}; it has no keys"),
        PlanLine("cost", f"{cost}; from creation to deletion, empty or full"),
        PlanLine("end", "phi3 rag down, or phi3 down --on azure"),
    ]


def usd_per_hour(tier: str, location: str, *, url: str = PRICES) -> float | None:
    """The list price of one search unit; None where the list does not say or does not answer."""
    listed = " or ".join(f"serviceName eq '{name}'" for name in _LISTED_AS)
    where = f"({listed}) and armRegionName eq '{location}' and priceType eq 'Consumption'"
    try:
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
) -> None:
    """Create what is missing and wait until this sign-in may use it.

    Raises StageError with the fix, also where the name is somebody else's.
    """
    tags = resource_tags(section)
    ensure_group(clients, tags, progress)
    ensure_resource(
        clients,
        f"search service {wanted.name}",
        wanted.id(clients.place),
        API,
        lambda: {
            "sku": {"name": wanted.tier},
            "properties": {
                "replicaCount": 1,
                "partitionCount": 1,
                "hostingMode": "default",
                "disableLocalAuth": True,  # no keys: roles alone
            },
        },
        tags,
        progress,
    )
    principal, kind = _signed_in(clients)
    for role in ROLES_ON_IT:
        ensure_grant(clients, Grant(role, wanted.id(clients.place), principal, kind))
    _wait_until_open(service or SearchService(wanted.endpoint), progress, sleep)


def remove_service(
    clients: Clients,
    service_id: str,
    progress: Progress,
    *,
    ours: str,
    service: SearchService | None = None,
) -> str:
    """Delete the service; a line that says what was done.

    Raises UsageError where it is not phi3's, or has indexes besides `ours`.
    """
    name = service_id.rsplit("/", 1)[-1]
    resources = clients.resources.resources
    read = partial(resources.get_by_id, service_id, api_version=API)
    found = get_or_none(read, f"Looking for the search service {name}")
    if found is None:
        return f"Was deleted before: the search service {name}"
    if not made_by_phi3(found.tags):
        raise UsageError(f"The search service {name} was not made by phi3, so it was left alone")
    others = [each for each in _indexes(service or SearchService(Wanted(name).endpoint))
              if each != ours]  # fmt: skip
    if others:
        raise UsageError(
            f"The search service {name} has other indexes, which would be deleted with it: "
            f"{', '.join(others)}. Delete them first, or the service: az search service delete"
        )
    start = partial(resources.begin_delete_by_id, service_id, api_version=API)
    poll = clients.poll
    doing = f"Deleting the search service {name}"
    delete(doing, start, read, progress, limit=poll.provision_timeout, pause=poll.interval)
    return f"Deleted the search service {name}"


def _indexes(service: SearchService) -> list[str]:
    """The names of its indexes; none where it does not answer (yet, or any more)."""
    try:
        listed = service.call("GET", "/indexes") or {}
    except (AuthenticationError, ServiceError):
        return []
    return [str(each.get("name")) for each in listed.get("value", ())]


def _wait_until_open(
    service: SearchService, progress: Progress, sleep: Callable[[float], None]
) -> None:
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


def _signed_in(clients: Clients) -> tuple[str, str]:
    """Object id and principal type of whoever signed in, as the token for ARM says."""
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
    return principal, "ServicePrincipal" if claims.get("idtyp") == "app" else "User"
