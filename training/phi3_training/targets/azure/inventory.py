"""What stands in the workspace and what of it bills: for `status`, and for what `down` deletes.

Reads Azure only; a part that may not be read is said to be unknown, never taken for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ...run import Run
from .clients import Clients
from .endpoints import OWNER_TAG, shares
from .failures import message_of
from .jobs import tickets
from .prices import price_of
from .waiting import absent, state_of

T = TypeVar("T")
_SHOWN_JOBS = 5


@dataclass(frozen=True)
class Deployment:
    """One deployment: machines that bill for as long as it exists, whatever its state."""

    name: str
    state: str
    size: str
    count: int
    traffic: int
    model: str = ""


@dataclass(frozen=True)
class Endpoint:
    """An endpoint with its deployments; `owner` is the run that made it."""

    name: str
    state: str
    auth_mode: str
    url: str
    owner: str | None
    deployments: tuple[Deployment, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """A cluster; `nodes` is None where they cannot be counted."""

    name: str
    state: str
    size: str
    least: int
    most: int
    nodes: int | None
    ours: bool


@dataclass
class Inventory:
    """All that was found, and what could not be read."""

    endpoints: list[Endpoint] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)
    jobs: list[tuple[str, str]] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    stands: bool = True  # the resource group, and so what bills little
    region: str = ""

    def billing(self) -> list[str]:
        """A line for everything that bills by the hour now."""
        found = []
        for endpoint in self.endpoints:
            for item in endpoint.deployments:
                price = price_of(item.size, item.count, self.region)
                mark = "" if item.state == "succeeded" else f", {item.state}: bills all the same"
                found.append(
                    f"deployment {item.name} of {endpoint.name}: {item.count} x {item.size}{mark}; "
                    f"{price.text()}"
                )
        for cluster in self.clusters:
            count = cluster.nodes if cluster.nodes is not None else cluster.least
            if count:
                price = price_of(cluster.size, count, self.region)
                found.append(f"cluster {cluster.name}: {count} x {cluster.size}; {price.text()}")
            elif cluster.nodes is None:
                found.append(f"cluster {cluster.name}: bills while it has nodes (not counted)")
        return found


def take(clients: Clients, run: Run) -> Inventory:
    """Look at the workspace: everybody's endpoints and clusters, this run's jobs and models."""
    ml, found = clients.ml, Inventory(region=clients.workplace.location)
    found.endpoints = [
        _endpoint(clients, item, found)
        for item in _read(found, "endpoints", lambda: list(ml.online_endpoints.list()))
    ]
    found.clusters = [
        _cluster(clients, item)
        for item in _read(found, "clusters", lambda: list(ml.compute.list()))
        if str(getattr(item, "type", "")).lower() == "amlcompute"
    ]
    for name in [ticket.name for ticket in tickets(run).values()][-_SHOWN_JOBS:]:
        for job in _read(found, f"job {name}", partial(_one, ml.jobs.get, name)):
            status = getattr(job.status, "value", job.status)
            found.jobs.append((name, str(status)))
    group = clients.workplace.resource_group
    there = _read(
        found, "resource group", partial(_one, clients.resources.resource_groups.get, group)
    )
    found.stands = bool(there or found.unknown)
    registered = (run.manifest("registration") or {}).get("model")
    if registered:
        versions = _read(found, "models", lambda: list(ml.models.list(name=registered)))
        found.models = sorted((f"{item.name}:{item.version}" for item in versions), key=_by_number)
    return found


def lines(found: Inventory, run: Run) -> list[str]:
    """The inventory for people."""
    told = [f"job {name}: {status}" for name, status in found.jobs]
    told += [f"model {name}" for name in found.models[-_SHOWN_JOBS:]]
    for endpoint in found.endpoints:
        whose = "" if endpoint.owner == run.name else f", of {endpoint.owner or 'somebody else'}"
        told.append(f"endpoint {endpoint.name}: {endpoint.state}, {endpoint.auth_mode}{whose}")
        told += [
            f"  deployment {item.name}: {item.state}, {item.traffic} % of the traffic, "
            f"{item.count} x {item.size}, {item.model}".rstrip(", ")
            for item in endpoint.deployments
        ]
    for cluster in found.clusters:
        nodes = "nodes unknown" if cluster.nodes is None else f"{cluster.nodes} nodes now"
        told.append(
            f"cluster {cluster.name}: {cluster.state}, {cluster.size}, "
            f"{cluster.least} to {cluster.most} nodes, {nodes}"
        )
    billing = found.billing()
    told += [f"bills now: {line}" for line in billing] or ["bills now: nothing by the hour"]
    if found.stands:
        told.append("bills little: storage account, container registry, logs (until --all)")
    told += [f"could not be read: {what}" for what in found.unknown]
    return told


def _endpoint(clients: Clients, item: Any, found: Inventory) -> Endpoint:
    name = str(item.name)
    listed = _read(
        found,
        f"deployments of {name}",
        lambda: list(clients.ml.online_deployments.list(name)),
    )
    traffic = shares(item.traffic)
    deployments = tuple(
        Deployment(
            name=str(deployment.name),
            state=state_of(deployment),
            size=str(deployment.instance_type),
            count=int(deployment.instance_count or 1),
            traffic=traffic.get(str(deployment.name), 0),
            model=model_name(deployment.model),
        )
        for deployment in listed
    )
    return Endpoint(
        name=name,
        state=state_of(item),
        auth_mode=str(item.auth_mode),
        url=str(item.scoring_uri or ""),
        owner=(item.tags or {}).get(OWNER_TAG),
        deployments=deployments,
    )


def model_name(model: Any) -> str:
    """`name:version` out of a model's id."""
    text = str(model or "")
    parts = text.split("/")
    if "models" in parts and "versions" in parts:
        return f"{parts[parts.index('models') + 1]}:{parts[parts.index('versions') + 1]}"
    return text.removeprefix("azureml:")


def _cluster(clients: Clients, item: Any) -> Cluster:
    from azure.core.exceptions import AzureError

    name = str(item.name)
    try:
        nodes: int | None = len(list(clients.ml.compute.list_nodes(name)))
    except AzureError:
        nodes = None
    return Cluster(
        name=name,
        state=state_of(item),
        size=str(getattr(item, "size", "") or ""),
        least=int(getattr(item, "min_instances", 0) or 0),
        most=int(getattr(item, "max_instances", 0) or 0),
        nodes=nodes,
        ours=(item.tags or {}).get("created-by") == "phi3-promptflow",
    )


def _read(found: Inventory, what: str, read: Callable[[], Iterable[T]]) -> list[T]:
    """What `read` gives; nothing where the thing is gone, and a remark where it may not be read."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    try:
        return list(read())
    except (AzureError, MlException) as error:
        if not absent(error):
            found.unknown.append(f"{what} ({message_of(error)[:120]})")
        return []


def _one(get: Callable[[str], Any], name: str) -> list[Any]:
    return [get(name)]


def _by_number(name: str) -> tuple[int, str]:
    version = name.rpartition(":")[2]
    return (int(version) if version.isdecimal() else 0, name)
