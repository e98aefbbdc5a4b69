"""Machine sizes: GPUs, cores, price per hour, the quota that they need, and waiting for it.

What Azure lists for the region counts; the dated table here fills in what the list leaves out.
Azure ML's quota is per family and region, and separate from the quota of virtual machines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ...errors import StageError
from ...progress import Progress, note
from ...recipe import Recipe
from ...recipe.azure import GPU_SIZE, AzureSection
from .clients import Clients
from .failures import code_of, explained, stage_error
from .operations import find, wait_for

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """One machine size.

    `extra_quota`: online deployments need a fifth more quota than they use. `usd_per_hour`: None
    where no source is known.
    """

    name: str
    cores: int
    gpus: int
    family: str
    extra_quota: bool
    gpu: str = ""
    usd_per_hour: float | None = None


# GPUs, cores and families: Azure ML's "Managed online endpoints SKU list" and "VM sizes", as of
# 2026-11-21. Family names are spelled as `usages` answers them; even their spaces differ.
# For scale: a model of 3.8 billion parameters in bf16 takes 7.6 GB, so serving fits every GPU here;
# a T4 has no bf16 and no flash attention 2. LoRA needs the 80 GB, which is also the smallest size
# on the catalogue's list for fine-tuning.
# Prices, for when prices.py cannot ask: US dollars per hour and machine, Linux, pay as you go, from
# the Azure Retail Prices API on this date in this region. Only two sizes have a price that more
# than one source agrees on; for all others the price page is named rather than a guess. Azure ML
# adds no charge of its own.
PRICE_DATE, PRICE_REGION = "2026-11-09", "eastus"
PRICE_PAGE = "https://azure.microsoft.com/pricing/details/machine-learning/"
_A100, _H100 = "standardNCADSA100v4Family", "standardNCADSH100v5Family"
_T4, _A10 = "standard NCASv3_T4 Family", "standardNVADSA10v5Family"
_ND_A100_40, _ND_A100_80 = "standard NDASv4_A100 Family", "standard NDAMSv4_A100Family"
_ND_H100 = "standardNDSH100v5Family"
TABLE = {
    size.name.lower(): size
    for size in (
        Size("Standard_NC24ads_A100_v4", 24, 1, _A100, False, "A100 80 GB", 3.673),
        Size("Standard_NC48ads_A100_v4", 48, 2, _A100, False, "A100 80 GB"),
        Size("Standard_NC96ads_A100_v4", 96, 4, _A100, False, "A100 80 GB"),
        Size("Standard_NC40ads_H100_v5", 40, 1, _H100, False, "H100 94 GB", 6.98),
        Size("Standard_NC80adis_H100_v5", 80, 2, _H100, False, "H100 94 GB"),
        Size("Standard_ND96asr_v4", 96, 8, _ND_A100_40, False, "A100 40 GB"),
        Size("Standard_ND96amsr_A100_v4", 96, 8, _ND_A100_80, False, "A100 80 GB"),
        Size("Standard_ND96isr_H100_v5", 96, 8, _ND_H100, False, "H100 80 GB"),
        Size("Standard_NC4as_T4_v3", 4, 1, _T4, True, "T4 16 GB"),
        Size("Standard_NC8as_T4_v3", 8, 1, _T4, True, "T4 16 GB"),
        Size("Standard_NC16as_T4_v3", 16, 1, _T4, True, "T4 16 GB"),
        Size("Standard_NC64as_T4_v3", 64, 4, _T4, True, "T4 16 GB"),
        Size("Standard_NV36ads_A10_v5", 36, 1, _A10, True, "A10 24 GB"),
        Size("Standard_DS3_v2", 4, 0, "standardDSv2Family", True),
        Size("Standard_D12_v2", 4, 0, "standardDv2Family", True),
    )
}
# Azure's "Retired VM sizes" page. The V100 sizes are still the defaults of the catalogue's
# fine-tuning pipeline, and still in Azure ML's own list of sizes for endpoints.
_K80, _V100 = "K80, retired 2023-08-31", "V100, retired 2025-09-30"
_P40, _P100 = "P40, retired 2023-08-31", "P100, retired 2023-08-31"
RETIRED = {
    **dict.fromkeys(("standard_nc6", "standard_nc12", "standard_nc24", "standard_nc24r"), _K80),
    **{f"standard_nc{n}_v2": _P100 for n in ("6s", "12s", "24s", "24rs")},
    **{f"standard_nc{n}_v3": _V100 for n in ("6s", "12s", "24s", "24rs")},
    **{f"standard_nd{n}": _P40 for n in ("6s", "12s", "24s", "24rs")},
}
# All low-priority cores of a region are one pool, whatever their family.
LOW_PRIORITY = "TotalLowPriorityCores"


def refuse_retired(name: str, key: str) -> None:
    """StageError for a size that no longer exists; `key` is the recipe's key that names it."""
    if name.lower() in RETIRED:
        raise StageError(
            f"{key} {name} no longer exists ({RETIRED[name.lower()]}). Use {key}={GPU_SIZE}"
        )


def refuse_outside(allowed: Iterable[str] | None, name: str, key: str, model: str) -> None:
    """StageError unless the model's list of sizes has `name`; None allows every size."""
    refuse_retired(name, key)
    if allowed is None:
        return
    usable = [size for size in allowed if size.lower() not in RETIRED]
    if name.lower() not in (size.lower() for size in usable):
        raise StageError(
            f"{model} does not support {key} {name}. It supports: {', '.join(usable)}. "
            f"Set {key} to one of them"
        )


def find_size(clients: Clients, name: str, key: str) -> Size:
    """The size as the region offers it. StageError when it does not."""
    refuse_retired(name, key)
    location = clients.place.location
    with explained(f"Listing the machine sizes of {location}"):
        offered = list(clients.subscription.compute.list_sizes(location=location))
    known = TABLE.get(name.lower())
    # "Manage and increase quotas" exempts NC A100 v4, NC H100 v5 and all ND sizes from the 20 %.
    lower = name.lower()
    is_exempt = lower.startswith("standard_nd") or lower.endswith(("_a100_v4", "_h100_v5"))
    for item in offered:
        if str(item.name).lower() != name.lower():
            continue
        cores, gpus = _cores_and_gpus(item)
        return Size(
            name=str(item.name),
            cores=cores or (known.cores if known else 0),
            gpus=gpus or (known.gpus if known else 0),
            family=str(getattr(item, "family", None) or (known.family if known else "")),
            extra_quota=known.extra_quota if known else not is_exempt,
            gpu=known.gpu if known else "",
            usd_per_hour=known.usd_per_hour if known else None,
        )
    if known is not None and not offered:
        return known
    with_gpu = sorted(str(item.name) for item in offered if _cores_and_gpus(item)[1])
    raise StageError(
        f"{key} {name} is not offered in {location}. GPU sizes there: "
        f"{', '.join(with_gpu) or 'none'}. Choose one of them ({key}=…) or another azure.location"
    )


def _cores_and_gpus(item: object) -> tuple[int, int]:
    # azure-ai-ml 1.32 has `v_cp_us`; in 1.35 that is None, and the object keeps the wire's `vCPUs`.
    values = vars(item)
    return int(values.get("v_cp_us") or values.get("vCPUs") or 0), int(values.get("gpus") or 0)


def gpus_in(clients: Clients, name: str, key: str) -> int:
    """GPUs of one machine, at least one. StageError for a size without any."""
    size = find_size(clients, name, key)
    if size.gpus < 1:
        raise StageError(
            f"{key} {name} has no GPU, and fine-tuning needs one. Use {key}={GPU_SIZE}"
        )
    return size.gpus


@dataclass(frozen=True)
class Need:
    """Cores that one purpose needs of a family; `used` and `limit` None: Azure did not say."""

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
        """Cores that are left of the quota now."""
        return None if self.limit is None else max(0, self.limit - (self.used or 0))

    def text(self) -> str:
        """One line for a person."""
        has = "quota unknown" if self.limit is None else f"{self.used or 0} of {self.limit} used"
        return (
            f"{self.purpose}: {self.instances} x {self.size} needs {self.cores} cores of "
            f"{self.family} ({self.rule}); {has}"
        )


def cores_needed(size: Size, instances: int, *, online: bool) -> tuple[int, str]:
    """Cores that must be free, and why so many."""
    # An online deployment needs quota for a fifth more machines than it has, rounded up, unless its
    # size is exempt: one T4 machine needs quota for two.
    if online and size.extra_quota:
        return math.ceil(1.2 * instances) * size.cores, "with 20 % reserved for upgrades"
    if online:
        return instances * size.cores, "this size is exempt from the 20 % reserve"
    return instances * size.cores, "clusters need no reserve"


def quota_needs(clients: Clients, recipe: Recipe) -> list[Need]:
    """What the recipe's cluster and endpoint need, with what the subscription has."""
    cluster, endpoint = recipe.azure.compute, recipe.azure.endpoint
    usage = quota_usage(clients)
    needs = []
    for purpose, key, name, instances, online in (
        ("training", "azure.compute.size", cluster.size, cluster.max_instances, False),
        (
            "endpoint",
            "azure.endpoint.instance_type",
            endpoint.instance_type,
            endpoint.instance_count,
            True,
        ),
    ):
        size = find_size(clients, name, key)
        cores, rule = cores_needed(size, instances, online=online)
        low_priority = not online and cluster.tier == "LowPriority"
        family = LOW_PRIORITY if low_priority else size.family
        used, limit = usage.get(family_key(family), (None, None))
        needs.append(Need(purpose, key, size.name, instances, family, cores, rule, used, limit))
    return needs


def quota_usage(clients: Clients) -> dict[str, tuple[int, int]]:
    """Cores (used, limit) of each family in the region; empty where one may not read them."""
    from azure.core.exceptions import AzureError

    location = clients.place.location
    usage: dict[str, tuple[int, int]] = {}
    try:
        for item in clients.subscription.compute.list_usage(location=location):
            # A plain dictionary in some versions of azure-ai-ml, an object in others.
            name: object = item.name
            value = name.get("value") if isinstance(name, dict) else getattr(name, "value", name)
            # 1.35 leaves `current_value` None and keeps the wire's `currentValue`.
            used = item.current_value
            if used is None:
                used = vars(item).get("currentValue")
            if item.limit is not None:
                usage[family_key(str(value or ""))] = (int(used or 0), int(item.limit))
    except AzureError as error:
        if getattr(error, "status_code", None) == 403:
            return {}
        raise stage_error(error, f"Reading the quota of {location}") from None
    return usage


def family_key(family: str) -> str:
    """`usages` and `vmSizes` spell the same family with other spaces and capitals."""
    return family.replace(" ", "").lower()


def short_of_quota(needs: list[Need], *, of_limit: bool = False) -> list[Need]:
    """Those that do not fit into what is free (or, with `of_limit`, into the whole limit)."""
    return [
        need
        for need in needs
        if need.limit is not None and need.cores > (need.limit if of_limit else need.free or 0)
    ]


def quota_shortage(needs: list[Need]) -> list[Need]:
    """Those of the two needs that would stop `up`."""
    # The cluster gives its cores back before the endpoint needs them, so the endpoint's need is
    # held against the limit, not against what is free now.
    training, endpoint = needs
    return short_of_quota([training]) + short_of_quota([endpoint], of_limit=True)


def refuse_shortage(short: list[Need]) -> None:
    """StageError that names every shortage and how to get more."""
    if not short:
        return
    lines = "\n".join(f"  {need.text()}" for need in short)
    most = max(short, key=lambda need: need.cores)
    keys = ", ".join(dict.fromkeys(need.key for need in short))
    raise StageError(
        f"There is not enough quota, and nothing was created:\n{lines}\n"
        f"Fix: request more: phi3 azure quota --request {(most.used or 0) + most.cores} (GPU "
        f"families start at 0; an answer takes minutes to days), or use another size ({keys}) or "
        f"azure.location"
    )


def request_quota(clients: Clients, family: str, limit: int, progress: Progress) -> str:
    """Ask for `limit` cores of a family in all; what Azure answered."""
    from azure.core.exceptions import AzureError
    from azure.mgmt.quota.models import (
        CurrentQuotaLimitBase,
        LimitObject,
        QuotaProperties,
        ResourceName,
    )

    place = clients.place
    doing = f"Asking for {limit} cores of {family} in {place.location}"
    scope = (
        f"{place.subscription_scope.lstrip('/')}/providers/"
        f"Microsoft.MachineLearningServices/locations/{place.location}"
    )
    body = CurrentQuotaLimitBase(
        properties=QuotaProperties(limit=LimitObject(value=limit), name=ResourceName(value=family))
    )
    try:
        poller = clients.quota.quota.begin_create_or_update(family, scope, body)
        wait_for(poller, doing, progress, clients.poll.provision_timeout)
    except AzureError as error:
        code = (code_of(error) or "").lower()
        if code in ("contactsupport", "quotanotavailableforresource", "requestthrottled"):
            raise StageError(
                f"{doing}: this needs a manual decision by Azure. Request it in the portal: Help "
                f"+ support > "
                "Service and subscription limits (quotas) > Machine Learning service"
            ) from None
        raise stage_error(error, doing) from None
    with explained(doing):
        answer = clients.quota.quota.get(family, scope)
    granted = getattr(getattr(answer.properties, "limit", None), "value", None)
    if granted is None:
        return "accepted; check with: phi3 azure quota"
    if int(granted) < limit:
        return f"not granted yet: the limit is {granted}"
    return f"granted: the limit is {granted}"


# --- cores that the cluster still holds when the endpoint needs them ---
# A cluster keeps a node for `azure.compute.idle_time_before_scale_down` after its last job, and the
# node's cores count until it is gone.

# Seconds that Azure may take to give a node back after its idle time: it drains it and frees the
# machine, and the quota follows. Minutes as people report them; Microsoft names no figure.
RELEASE_SECONDS = 900.0


def taking_turns(needs: list[Need], section: AzureSection) -> str:
    """A line for `plan` where cluster and endpoint fit into the quota one after the other only."""
    training, endpoint = needs
    both = training.cores + endpoint.cores
    if training.limit is None or training.family != endpoint.family or both <= training.limit:
        return ""
    if max(training.cores, endpoint.cores) > training.limit:
        return ""  # that one does not fit at all
    if section.compute.min_instances:
        return (
            f"cluster and endpoint together need {both} cores of {endpoint.family}, the quota is "
            f"{training.limit}, and azure.compute.min_instances={section.compute.min_instances} "
            "keeps nodes: the deployment may be refused. Request more (phi3 azure quota --request "
            f"{both}) or set azure.compute.min_instances=0"
        )
    idle = section.compute.idle_time_before_scale_down
    return (
        f"cluster and endpoint together need {both} cores of {endpoint.family}, the quota is "
        f"{training.limit}: `deploy` waits until the cluster's node is gone, {idle} s after the "
        "last job and the minutes that Azure takes; training again needs the endpoint's cores "
        "(phi3 down --on azure)"
    )


@dataclass(frozen=True)
class _Held:
    """Cores that the endpoint needs and that are free, and the nodes that may give some back."""

    cluster: str
    family: str
    needed: int
    free: int
    limit: int
    nodes: int


@dataclass(frozen=True)
class _Cluster:
    """The cluster; `needed` cores of its family are what the endpoint needs."""

    name: str
    family: str
    needed: int
    least: int  # nodes that never go

    @classmethod
    def of(cls, clients: Clients, section: AzureSection) -> _Cluster | None:
        """The cluster, where it exists and its nodes count against the endpoint's quota."""
        compute, endpoint = section.compute, section.endpoint
        if compute.tier == "LowPriority":  # a pool of its own
            return None
        cluster = find("cluster", compute.name, clients.ml.compute.get)
        if cluster is None:
            return None
        size = find_size(clients, endpoint.instance_type, "azure.endpoint.instance_type")
        # The cluster's own size: it may have been made with another one than the recipe says.
        own_size = str(getattr(cluster, "size", None) or compute.size)
        if find_size(clients, own_size, "azure.compute.size").family != size.family:
            return None
        needed, _rule = cores_needed(size, endpoint.instance_count, online=True)
        least = int(getattr(cluster, "min_instances", 0) or 0)
        return cls(compute.name, size.family, needed, least)

    def look(self, clients: Clients) -> _Held | None:
        """None where no node can go, or Azure does not say."""
        from azure.core.exceptions import AzureError

        try:
            nodes = len(list(clients.ml.compute.list_nodes(self.name))) - self.least
        except AzureError:
            return None
        used, limit = quota_usage(clients).get(family_key(self.family), (0, 0))
        if nodes <= 0 or not limit:
            return None
        return _Held(self.name, self.family, self.needed, max(0, limit - used), limit, nodes)


def when_cores_are_free(
    clients: Clients, section: AzureSection, start: Callable[[], T], progress: Progress
) -> T:
    """What `start` returns, once idling nodes have given back the cores that the endpoint needs.

    Raises what `start` raises; a refusal for lack of quota only when no node can go any more.
    StageError where the nodes are still there at the time limit.
    """
    from azure.core.exceptions import HttpResponseError

    idle = section.compute.idle_time_before_scale_down
    limit = idle + RELEASE_SECONDS
    cluster = _Cluster.of(clients, section)
    started = time.monotonic()
    while True:
        held = cluster.look(clients) if cluster else None
        seconds = time.monotonic() - started
        if not held or held.free >= held.needed:
            try:
                return start()
            except HttpResponseError as error:
                # The figures lag behind: Azure has the last word.
                is_short = (code_of(error) or "").lower() in ("outofquota", "quotaexceeded")
                if not held or not is_short or seconds > limit:
                    raise
        elif seconds > limit:
            raise StageError(
                f"The deployment needs {held.needed} cores of {held.family}; {held.free} are free, "
                f"and the cluster {held.cluster} still holds {held.nodes} node(s) after "
                f"{limit:.0f} s. A job may be working there: phi3 status --on azure. Or request "
                f"more: phi3 azure quota --request {held.limit + held.needed - held.free}"
            )
        note(
            progress,
            f"waiting for {held.needed} cores: {held.nodes} node(s) of {held.cluster} hold them "
            f"until {idle} s after the last job, {seconds:.0f} s",
        )
        time.sleep(clients.poll.interval)
