"""Cores of a GPU family: needed, used, allowed, before anything is made; and asking for more.

Azure ML's quota is per family and region, and apart from that of virtual machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...errors import StageError
from ...recipe import Recipe
from .clients import Clients
from .failures import code_of, explained, stage_error
from .sizes import Size, find_size
from .waiting import follow

LOW_PRIORITY = "TotalLowPriorityCores"


@dataclass(frozen=True)
class Need:
    """Cores that one purpose asks of a family; `used` and `limit` None: Azure did not say."""

    purpose: str
    key: str
    size: str
    instances: int
    family: str
    cores: int
    rule: str
    used: int | None = None
    limit: int | None = None

    @property
    def free(self) -> int | None:
        """What is left of the quota now."""
        return None if self.limit is None else max(0, self.limit - (self.used or 0))

    def text(self) -> str:
        """One line for a person."""
        has = "quota unknown" if self.limit is None else f"{self.used or 0} of {self.limit} used"
        return (
            f"{self.purpose}: {self.instances} x {self.size} needs {self.cores} cores of "
            f"{self.family} ({self.rule}); {has}"
        )


def cores_needed(size: Size, instances: int, *, online: bool) -> tuple[int, str]:
    """Cores that must be free, and why so many.

    An online deployment needs a fifth more, for upgrades, unless its size is excepted.
    """
    if online and size.extra_quota:
        return math.ceil(1.2 * instances) * size.cores, "20 % more are reserved for upgrades"
    if online:
        return instances * size.cores, "this size is excepted from the 20 % reserve"
    return instances * size.cores, "clusters need no reserve"


def needs(clients: Clients, recipe: Recipe) -> list[Need]:
    """What the recipe's cluster and endpoint need, with what the subscription has."""
    cluster, endpoint = recipe.azure.compute, recipe.azure.endpoint
    usages = usage(clients)
    return [
        need_of(
            clients,
            "training",
            "azure.compute.size",
            cluster.size,
            cluster.max_instances,
            online=False,
            low_priority=cluster.tier == "LowPriority",
            usages=usages,
        ),
        need_of(
            clients,
            "endpoint",
            "azure.endpoint.instance_type",
            endpoint.instance_type,
            endpoint.instance_count,
            online=True,
            usages=usages,
        ),
    ]


def need_of(
    clients: Clients,
    purpose: str,
    key: str,
    name: str,
    instances: int,
    *,
    online: bool,
    low_priority: bool = False,
    usages: dict[str, tuple[int, int]] | None = None,
) -> Need:
    """What `instances` machines of a size need, with what the subscription has."""
    size = find_size(clients, name, key)
    cores, rule = cores_needed(size, instances, online=online)
    family = LOW_PRIORITY if low_priority else size.family
    found = (usages if usages is not None else usage(clients)).get(_key(family))
    used, limit = found if found is not None else (None, None)
    return Need(purpose, key, size.name, instances, family, cores, rule, used, limit)


def usage(clients: Clients) -> dict[str, tuple[int, int]]:
    """(used, limit) of each family in the region; empty where one may not read it."""
    from azure.core.exceptions import AzureError

    location = clients.workplace.location
    found: dict[str, tuple[int, int]] = {}
    try:
        for item in clients.subscription.compute.list_usage(location=location):
            used = _used(item)
            if item.limit is not None:
                found[_key(_name(item))] = (used, int(item.limit))
    except AzureError as error:
        if getattr(error, "status_code", None) == 403:
            return {}
        raise stage_error(error, f"Reading the quota of {location}") from None
    return found


def lacking(found: list[Need], *, of_limit: bool = False) -> list[Need]:
    """Those that do not fit into what is free (or, at all, into the limit)."""
    return [
        need
        for need in found
        if need.limit is not None and need.cores > (need.limit if of_limit else need.free or 0)
    ]


def refuse_lacking(short: list[Need]) -> None:
    """StageError that names every shortage and the mends."""
    if not short:
        return
    lines = "\n".join(f"  {need.text()}" for need in short)
    most = max(short, key=lambda need: need.cores)
    keys = ", ".join(dict.fromkeys(need.key for need in short))
    raise StageError(
        f"The quota does not suffice, and nothing was made:\n{lines}\n"
        f"Mend: ask for it: phi3 azure quota --request {(most.used or 0) + most.cores} "
        f"(GPU families start at 0; an answer takes minutes to days), or take another size "
        f"({keys}) or azure.location"
    )


def scope_of(clients: Clients) -> str:
    """The scope of Azure ML's quota in the region."""
    place = clients.workplace
    return (
        f"{place.subscription_scope.lstrip('/')}/providers/"
        f"Microsoft.MachineLearningServices/locations/{place.location}"
    )


def request(clients: Clients, family: str, limit: int, progress: Any) -> str:
    """Ask for `limit` cores of a family in all; the state that Azure gives the request."""
    from azure.core.exceptions import AzureError
    from azure.mgmt.quota.models import (
        CurrentQuotaLimitBase,
        LimitObject,
        QuotaProperties,
        ResourceName,
    )

    doing = f"Asking for {limit} cores of {family} in {clients.workplace.location}"
    body = CurrentQuotaLimitBase(
        properties=QuotaProperties(limit=LimitObject(value=limit), name=ResourceName(value=family))
    )
    try:
        poller = clients.quota.quota.begin_create_or_update(family, scope_of(clients), body)
        follow(poller, doing, progress, clients.poll.provision_timeout)
    except AzureError as error:
        code = (code_of(error) or "").lower()
        if code in ("contactsupport", "quotanotavailableforresource", "requestthrottled"):
            raise StageError(
                f"{doing}: Azure decides on this by hand. File it in the portal: Help + support > "
                "Service and subscription limits (quotas) > Machine Learning service"
            ) from None
        raise stage_error(error, doing) from None
    with explained(doing):
        answer = clients.quota.quota.get(family, scope_of(clients))
    granted = getattr(getattr(answer.properties, "limit", None), "value", None)
    if granted is None:
        return "accepted; see it with: phi3 azure quota"
    if int(granted) < limit:
        return f"not granted yet: the limit is {granted}"
    return f"granted: the limit is {granted}"


def _name(item: Any) -> str:
    name = item.name
    if isinstance(name, dict):
        return str(name.get("value") or "")
    return str(getattr(name, "value", name) or "")


def _used(item: Any) -> int:
    value = item.current_value
    if value is None:  # newer SDKs leave it under its wire name
        value = vars(item).get("currentValue")
    return int(value or 0)


def _key(family: str) -> str:
    return family.replace(" ", "").lower()
