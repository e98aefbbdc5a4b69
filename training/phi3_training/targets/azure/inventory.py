"""What exists in a workspace, what of it bills, how much so far, and until when. Changes nothing.

A part that may not be read is reported as unknown, never taken for nothing. Each thing is counted
once for its workspace, whichever runs use it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ...errors import StageError
from .clients import Clients
from .deadline import Deadline, read_deadline
from .deploy import traffic_shares
from .failures import message_of
from .operations import is_absent, state_of
from .place import ROLLOUT_TAG, RUN_TAG
from .prices import Price
from .search_service import Made, made_services
from .workflow import shown, utc_now

if TYPE_CHECKING:
    from azure.ai.ml.entities import Compute, OnlineEndpoint

T = TypeVar("T")


@dataclass(frozen=True)
class Deployment:
    """One deployment: machines that bill for as long as it exists, whatever its state."""

    name: str
    state: str
    size: str
    count: int
    traffic: int  # percent
    model: str = ""
    since: dt.datetime | None = None  # when it was made
    price: Price | None = None  # of one machine


@dataclass(frozen=True)
class Endpoint:
    """An endpoint with its deployments; `owner` is the run that made it.

    `deadline` None: it is not phi3's, or its deadline could not be read.
    """

    name: str
    state: str
    auth_mode: str
    owner: str | None
    deployments: tuple[Deployment, ...] = ()
    deadline: Deadline | None = None
    rollout: str = ""  # its tag of an unfinished rollout

    def lines(self) -> list[str]:
        """It and its deployments, for people."""
        return [
            f"endpoint {self.name}: {self.state}, {self.auth_mode}",
            *([f"  unfinished rollout {self.rollout}"] if self.rollout else []),
            *(
                f"  deployment {item.name}: {item.state}, {item.traffic} % of the traffic, "
                f"{item.count} x {item.size}, {item.model}".rstrip(", ")
                for item in self.deployments
            ),
            *(f"  {line}" for line in (self.deadline.lines() if self.deadline else ())),
        ]


@dataclass(frozen=True)
class Cluster:
    """A cluster; `nodes` is None where they cannot be counted."""

    name: str
    state: str
    size: str
    least: int
    most: int
    nodes: int | None
    price: Price | None = None  # of one machine

    def line(self) -> str:
        """It, for people."""
        nodes = "nodes unknown" if self.nodes is None else f"{self.nodes} nodes now"
        return (
            f"cluster {self.name}: {self.state}, {self.size}, {self.least} to {self.most} nodes, "
            f"{nodes}"
        )


@dataclass(frozen=True)
class Bill:
    """One thing that bills by the hour now; amounts in US dollars, None where not known."""

    text: str
    per_hour: float | None
    so_far: float | None = None
    until_deadline: float | None = None  # None also: there is no deadline that holds


@dataclass
class Inventory:
    """All that was found in a workspace, and what could not be read."""

    endpoints: list[Endpoint] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)
    searches: list[Made] = field(default_factory=list)  # of the resource group
    unknown: list[str] = field(default_factory=list)
    group_exists: bool = True  # the resource group, and so what bills little

    def bills(self, owner: str | None = None, now: dt.datetime | None = None) -> list[Bill]:
        """Everything that bills by the hour now; with `owner` the deployments of that run alone."""
        now = now or utc_now()
        found = [
            _deployment_bill(endpoint, item, now)
            for endpoint in self.endpoints
            if owner in (None, endpoint.owner)
            for item in endpoint.deployments
        ]
        if owner is None:
            found += [bill for cluster in self.clusters for bill in _cluster_bills(cluster)]
            found += [
                Bill(each.text(), each.per_hour, until_deadline=each.until_deadline())
                for each in self.searches
            ]
        return found

    def lines(self, shown_runs: Sequence[str] = ()) -> list[str]:
        """What the runs share, for people: all but the endpoints of the runs that are shown."""
        lines: list[str] = []
        for endpoint in self.endpoints:
            if endpoint.owner is None or endpoint.owner not in shown_runs:
                first, *rest = endpoint.lines()
                lines += [f"{first}, owner {endpoint.owner or 'somebody else'}", *rest]
        lines += [cluster.line() for cluster in self.clusters]
        bills = self.bills()
        lines += [f"bills now: {bill.text}" for bill in bills]
        lines.append(sum_of(bills))
        if self.group_exists:
            lines.append("small charges: storage account, container registry, logs (until --all)")
        return [*lines, *(f"could not be read: {what}" for what in self.unknown)]


def _deployment_bill(endpoint: Endpoint, item: Deployment, now: dt.datetime) -> Bill:
    mark = "" if item.state == "succeeded" else f", {item.state}: still bills"
    what = f"deployment {item.name} of {endpoint.name}: {item.count} x {item.size}{mark}"
    if item.price is None:
        return Bill(f"{what}; {_unknown(item.size)}", None)
    hourly = item.price.high * item.count
    so_far = None if item.since is None else hourly * _hours(now - item.since)
    text = f"{what}; {item.price.per_hour(item.count)} USD per hour ({item.price.source})"
    if so_far is not None:
        text += f", about {so_far:.2f} so far"
    deadline = endpoint.deadline
    ends = deadline.at if deadline is not None and deadline.holds else None
    if deadline is not None and not item.traffic:
        ends = deadline.end_of(item.name)
    if ends is None:
        return Bill(f"{text}, {item.price.per_month(item.count)}", hourly, so_far)
    left = hourly * _hours(ends - now)
    text += f", at most {left:.2f} more until {shown(ends, now)}"
    return Bill(text, hourly, so_far, left)


def _cluster_bills(cluster: Cluster) -> list[Bill]:
    # A cluster bills for the nodes that it has, idle or not, until the idle time is over.
    count = cluster.nodes if cluster.nodes is not None else cluster.least
    if not count:
        unsure = cluster.nodes is None
        text = f"cluster {cluster.name}: bills while it has nodes (not counted)"
        return [Bill(text, None)] if unsure else []
    what = f"cluster {cluster.name}: {count} x {cluster.size}"
    if cluster.price is None:
        return [Bill(f"{what}; {_unknown(cluster.size)}", None)]
    return [Bill(f"{what}; {cluster.price.text(count)}", cluster.price.high * count)]


def _unknown(size: str) -> str:
    from .sizes import PRICE_PAGE

    return f"price of {size} unknown: see {PRICE_PAGE}"


def _hours(time: dt.timedelta) -> float:
    return max(0.0, time.total_seconds() / 3600)


def sum_of(bills: Iterable[Bill]) -> str:
    """All of it in one line: per hour, so far, and until the deadlines."""
    bills = list(bills)
    if not bills:
        return "bills now: nothing by the hour"
    known = [bill for bill in bills if bill.per_hour is not None]
    text = f"sum: {sum(bill.per_hour or 0 for bill in known):.2f} USD per hour"
    begun = [bill.so_far for bill in known if bill.so_far is not None]
    if begun:
        text += f", about {sum(begun):.2f} so far by deployments"
    ending = [bill.until_deadline for bill in known if bill.until_deadline is not None]
    if ending:
        text += f", at most {sum(ending):.2f} more until the deadlines"
    endless = sum(bill.per_hour or 0 for bill in known if bill.until_deadline is None)
    if endless:
        text += f"; {endless:.2f} per hour of it without a deadline"
    if len(known) < len(bills):
        text += f"; not counted: {len(bills) - len(known)} without a known price"
    return text


def cost_of(clients: Clients, endpoint: str) -> str:
    """What one endpoint's deployments cost, in one line."""
    found = [item for item in take_inventory(clients).endpoints if item.name == endpoint]
    return sum_of(Inventory(endpoints=found).bills())


def take_inventory(clients: Clients) -> Inventory:
    """Look at the workspace: everybody's endpoints and clusters."""
    ml = clients.ml
    inventory = Inventory()
    inventory.endpoints = [
        _endpoint(clients, item, inventory)
        for item in read_all(inventory, "endpoints", ml.online_endpoints.list)
    ]
    inventory.clusters = [
        _cluster(clients, item)
        for item in read_all(inventory, "clusters", ml.compute.list)
        # Other kinds are a person's own compute instances, attached machines and so on.
        if str(getattr(item, "type", "")).lower() == "amlcompute"
    ]
    groups, group = clients.resources.resource_groups, clients.place.resource_group
    search = partial(made_services, clients, group=group)
    inventory.searches = read_all(inventory, "search services", search)
    listed = read_all(inventory, "resource group", lambda: [groups.get(group)])
    inventory.group_exists = bool(listed or inventory.unknown)
    return inventory


def _endpoint(clients: Clients, item: OnlineEndpoint, inventory: Inventory) -> Endpoint:
    name, owner = str(item.name), (item.tags or {}).get(RUN_TAG)
    list_deployments = partial(clients.ml.online_deployments.list, name)
    shares = traffic_shares(item.traffic)
    deployments = []
    for deployment in read_all(inventory, f"deployments of {name}", list_deployments):
        size = str(getattr(deployment, "instance_type", None))
        made = getattr(getattr(deployment, "creation_context", None), "created_at", None)
        deployments.append(
            Deployment(
                name=str(deployment.name),
                state=state_of(deployment),
                size=size,
                count=int(deployment.instance_count or 1),
                traffic=shares.get(str(deployment.name), 0),
                model=model_label(deployment.model),
                since=made if isinstance(made, dt.datetime) else None,
                price=clients.prices.hourly(size, clients.place.location),
            )
        )
    deadline = None
    if owner is not None:
        try:
            deadline = _of_what_is(item, read_deadline(clients, name), deployments)
        except StageError as error:
            inventory.unknown.append(f"deadline of {name} ({str(error)[:120]})")
    return Endpoint(
        name=name,
        state=state_of(item),
        auth_mode=str(item.auth_mode),
        owner=owner,
        deployments=tuple(deployments),
        deadline=deadline,
        rollout=(item.tags or {}).get(ROLLOUT_TAG, ""),
    )


def _of_what_is(
    item: OnlineEndpoint, deadline: Deadline, deployments: Sequence[Deployment]
) -> Deadline:
    """A deadline without what it cannot do any more: its put-back needs the rollout's tag."""
    names = {deployment.name for deployment in deployments}
    removals = {name: at for name, at in deadline.removals.items() if name in names}
    back = deadline.put_back if ROLLOUT_TAG in (item.tags or {}) else None
    return replace(deadline, removals=removals, put_back=back)


def model_label(model: object) -> str:
    """`name:version` out of a model's id."""
    text = str(model or "")
    parts = text.split("/")
    if "models" in parts and "versions" in parts:
        return f"{parts[parts.index('models') + 1]}:{parts[parts.index('versions') + 1]}"
    return text.removeprefix("azureml:")


def _cluster(clients: Clients, item: Compute) -> Cluster:
    from azure.core.exceptions import AzureError

    name, size = str(item.name), str(getattr(item, "size", "") or "")
    try:
        nodes: int | None = len(list(clients.ml.compute.list_nodes(name)))
    except AzureError:
        nodes = None
    return Cluster(
        name=name,
        state=state_of(item),
        size=size,
        least=int(getattr(item, "min_instances", 0) or 0),
        most=int(getattr(item, "max_instances", 0) or 0),
        nodes=nodes,
        price=clients.prices.hourly(size, clients.place.location) if nodes != 0 else None,
    )


def read_all(inventory: Inventory, what: str, read: Callable[[], Iterable[T]]) -> list[T]:
    """What `read` gives; nothing where it does not exist, and a remark where it cannot be read."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    try:
        return list(read())
    except StageError as error:
        inventory.unknown.append(f"{what} ({str(error)[:120]})")
        return []
    except (AzureError, MlException) as error:
        if not is_absent(error):
            inventory.unknown.append(f"{what} ({message_of(error)[:120]})")
        return []
