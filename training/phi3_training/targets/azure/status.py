"""What exists on Azure, what bills and until when, and what `up` would add. Changes nothing."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from ...errors import StageError
from ...manifests import EndpointManifest, RegistrationManifest
from ...recipe import Recipe
from ...recipe.azure import NO_DEADLINE, EndpointSection, duration_of
from ...run import Run
from ..base import EndpointStatus, Overview, PlanLine, RunStatus
from .clients import Clients
from .costs import Price
from .deadline import Deadline, read_deadline, rule_text
from .failures import message_of
from .jobs import recorded_jobs
from .operations import find, is_absent, state_of
from .place import ROLLOUT_TAG, RUN_TAG, endpoint_name
from .rollout import plan_lines
from .search_service import Made, made_services
from .sizes import PRICE_PAGE, quota_needs, quota_shortage, refuse_retired, taking_turns
from .traffic import traffic_shares
from .train import choose_route
from .workflow import shown, utc_now

if TYPE_CHECKING:
    from azure.ai.ml.entities import OnlineEndpoint

T = TypeVar("T")
_SHOWN = 5  # jobs and models


# --- what exists in a workspace ---
# A part that may not be read is reported as unknown, never taken for nothing. Each thing is counted
# once for its workspace, whichever runs use it.


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

    def bill(self, endpoint: str, ends: dt.datetime | None, now: dt.datetime) -> Bill:
        """What it costs; `ends`: when it is gone, as far as one can see."""
        mark = "" if self.state == "succeeded" else f", {self.state}: still bills"
        what = f"deployment {self.name} of {endpoint}: {self.count} x {self.size}{mark}"
        if self.price is None:
            return Bill(f"{what}; {_unknown(self.size)}", None)
        hourly = self.price.high * self.count
        so_far = None if self.since is None else hourly * _hours(now - self.since)
        text = f"{what}; {self.price.per_hour(self.count)} USD per hour ({self.price.source})"
        if so_far is not None:
            text += f", about {so_far:.2f} so far"
        if ends is None:
            return Bill(f"{text}, {self.price.per_month(self.count)}", hourly, so_far)
        left = hourly * _hours(ends - now)
        text += f", at most {left:.2f} more until {shown(ends, now)}"
        return Bill(text, hourly, so_far, left)


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

    def bills(self, now: dt.datetime) -> list[Bill]:
        """What each deployment costs, until its own end where it has no traffic."""
        deadline, found = self.deadline, []
        for item in self.deployments:
            ends = deadline.at if deadline is not None and deadline.holds else None
            if deadline is not None and not item.traffic:
                ends = deadline.end_of(item.name)
            found.append(item.bill(self.name, ends, now))
        return found

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

    def bills(self) -> list[Bill]:
        """What it costs: for the nodes that it has, idle or not, until the idle time is over."""
        count = self.nodes if self.nodes is not None else self.least
        if not count:
            unsure = self.nodes is None
            text = f"cluster {self.name}: bills while it has nodes (not counted)"
            return [Bill(text, None)] if unsure else []
        what = f"cluster {self.name}: {count} x {self.size}"
        if self.price is None:
            return [Bill(f"{what}; {_unknown(self.size)}", None)]
        return [Bill(f"{what}; {self.price.text(count)}", self.price.high * count)]


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
        owned = [item for item in self.endpoints if owner in (None, item.owner)]
        found = [bill for endpoint in owned for bill in endpoint.bills(now)]
        if owner is None:
            found += [bill for cluster in self.clusters for bill in cluster.bills()]
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


def _unknown(size: str) -> str:
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
    from azure.core.exceptions import AzureError

    ml = clients.ml
    inventory = Inventory()
    inventory.endpoints = [
        _endpoint(clients, item, inventory)
        for item in read_all(inventory, "endpoints", ml.online_endpoints.list)
    ]
    region = clients.place.location
    for item in read_all(inventory, "clusters", ml.compute.list):
        # Other kinds are a person's own compute instances, attached machines and so on.
        if str(getattr(item, "type", "")).lower() != "amlcompute":
            continue
        name, size = str(item.name), str(getattr(item, "size", "") or "")
        try:
            nodes: int | None = len(list(ml.compute.list_nodes(name)))
        except AzureError:
            nodes = None
        inventory.clusters.append(
            Cluster(
                name=name,
                state=state_of(item),
                size=size,
                least=int(getattr(item, "min_instances", 0) or 0),
                most=int(getattr(item, "max_instances", 0) or 0),
                nodes=nodes,
                # The price list is not asked for what does not bill.
                price=clients.prices.hourly(size, region) if nodes != 0 else None,
            )
        )
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
            deadline = read_deadline(clients, name)
            # Without what it cannot do any more: its put-back needs the rollout's tag.
            names = {deployment.name for deployment in deployments}
            removals = {name: at for name, at in deadline.removals.items() if name in names}
            back = deadline.put_back if ROLLOUT_TAG in (item.tags or {}) else None
            deadline = replace(deadline, removals=removals, put_back=back)
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


def model_label(model: object) -> str:
    """`name:version` out of a model's id."""
    text = str(model or "")
    parts = text.split("/")
    if "models" in parts and "versions" in parts:
        return f"{parts[parts.index('models') + 1]}:{parts[parts.index('versions') + 1]}"
    return text.removeprefix("azureml:")


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


# --- how one run stands, and what its workspace costs ---


@dataclass(frozen=True)
class EndpointState:
    """`up` where the run's deployment is well and has traffic, `down` where not, or `none`."""

    state: Literal["up", "down", "none"]
    url: str = ""
    name: str = ""
    deployment: str = ""
    reason: str = ""  # why it is down

    def as_json(self) -> EndpointStatus:
        """What `-o json` shows: all that is known."""
        shown: EndpointStatus = {"state": self.state}
        if self.url:
            shown["url"] = self.url
        if self.name:
            shown["name"] = self.name
        if self.deployment:
            shown["deployment"] = self.deployment
        if self.reason:
            shown["reason"] = self.reason
        return shown


def endpoint_state(clients: Clients, run: Run) -> EndpointState:
    """The current state of the run's endpoint."""
    manifest = run.read(EndpointManifest)
    if manifest is None:
        return EndpointState("none")
    name, deployment = manifest.endpoint_name, manifest.deployment
    state = partial(EndpointState, url=manifest.endpoint, name=name, deployment=deployment)
    ml = clients.ml
    endpoint = find("endpoint", name, ml.online_endpoints.get)
    # One that is being deleted may keep its traffic and its deployments to the end.
    if endpoint is None or state_of(endpoint) == "deleting":
        return state("down", reason="the endpoint is gone")
    existing = find("deployment", deployment, lambda own: ml.online_deployments.get(own, name))
    if existing is None or state_of(existing) != "succeeded":
        how = "is gone" if existing is None else f"is {state_of(existing)}"
        return state("down", reason=f"the deployment {how}")
    # An endpoint without traffic rules answers 404, however well its deployment is.
    if not traffic_shares(endpoint.traffic).get(deployment):
        return state("down", reason="the deployment has no traffic")
    return state("up")


def status(clients: Clients, run: Run, inventory: Inventory) -> RunStatus:
    """The run's part: its endpoint's state, lines for people, and what of its own bills."""
    lines: list[str] = []
    # By name: a workspace may have thousands of jobs, and listing them takes pages.
    for name in [item.name for item in recorded_jobs(run).values()][-_SHOWN:]:
        # As a list of one, so that a job that is gone or may not be read is reported like the rest.
        read = partial(lambda name: [clients.ml.jobs.get(name)], name)
        for job in read_all(inventory, f"job {name}", read):
            state = getattr(job, "status", None)
            lines.append(f"job {name}: {getattr(state, 'value', state)}")
    registration = run.read(RegistrationManifest)
    if registration is not None:
        list_models = partial(clients.ml.models.list, name=registration.model)
        models = read_all(inventory, "models", list_models)
        # By number: as text, version 10 would come before version 9.
        models.sort(key=lambda m: (int(m.version) if str(m.version).isdecimal() else 0, m.version))
        lines += [f"model {item.name}:{item.version}" for item in models[-_SHOWN:]]
    for endpoint in inventory.endpoints:
        lines += endpoint.lines() if endpoint.owner == run.name else []
    return {
        "endpoint": endpoint_state(clients, run).as_json(),
        "lines": lines,
        "bills": [bill.text for bill in inventory.bills(run.name)],
    }


def overview(clients: Clients, inventory: Inventory, shown_runs: Sequence[str]) -> Overview:
    """What a workspace's runs share and what all of it costs, once, for people and as figures."""
    bills = inventory.bills()
    known = [bill for bill in bills if bill.per_hour is not None]
    place = clients.place
    return {
        "workspace": place.workspace_name,
        "resource_group": place.resource_group,
        "subscription": place.subscription_id,
        "lines": inventory.lines(shown_runs),
        "bills": [bill.text for bill in bills],
        "usd": {
            "per_hour": sum(bill.per_hour or 0 for bill in known),
            "so_far": sum(bill.so_far or 0 for bill in known),
            "until_deadlines": sum(bill.until_deadline or 0 for bill in known),
            "per_hour_without_deadline": sum(
                bill.per_hour or 0 for bill in known if bill.until_deadline is None
            ),
            "without_price": len(bills) - len(known),
        },
    }


# --- what `up` would create and cost ---


def plan(clients: Clients, recipe: Recipe, run: Run) -> list[PlanLine]:
    """What `up` would create and cost; each reason that would stop it is a separate line."""
    lines = [PlanLine("place", line) for line in clients.place.lines()]
    sizes = (
        ("provision", "azure.compute.size", recipe.azure.compute.size),
        ("deploy", "azure.endpoint.instance_type", recipe.azure.endpoint.instance_type),
    )
    for stage, key, size in sizes:
        try:
            refuse_retired(size, key)
        except StageError as error:
            lines.append(PlanLine(stage, str(error), stops=True))
    try:
        choice = choose_route(clients, recipe)
        lines.append(PlanLine("finetune", f"route {choice.route}: {choice.reason}"))
    except StageError as error:
        lines.append(PlanLine("finetune", str(error), stops=True))
    searches: list[PlanLine] = []
    # Azure is not queried when the recipe alone would stop `up`.
    if not any(line.stops for line in lines):
        # No recipe makes a search service; `phi3 rag index` may have.
        try:
            searches = [PlanLine("cost", each.text()) for each in made_services(clients)]
        except StageError as error:
            searches = [PlanLine("cost", f"search services that phi3 made: unknown ({error})")]
        lines += _existing(clients, recipe, run)
        lines += plan_lines(clients, recipe, run)
        try:
            needs = quota_needs(clients, recipe)
            # Once the cluster exists `up` asks for no quota: its job waits in Azure's queue.
            cluster = recipe.azure.compute.name
            waits = find("cluster", cluster, clients.ml.compute.get) is not None
            short = quota_shortage(needs)
            for need in needs:
                queued = "; a new job waits in the queue until cores are free" if waits else ""
                text = need.text() + (queued if need in short else "")
                lines.append(PlanLine("quota", text, stops=need in short and not waits))
            turns = taking_turns(needs, recipe.azure)
            lines += [PlanLine("deploy", turns)] if turns else []
        except StageError as error:
            lines.append(PlanLine("quota", str(error), stops=True))

    compute, endpoint = recipe.azure.compute, recipe.azure.endpoint
    region = clients.place.location
    training = clients.prices.text(compute.size, compute.max_instances, region)
    # A cluster scales down to min_instances; an online deployment has no zero to scale to.
    always_on = compute.min_instances
    always = f"; {always_on} nodes stay on and always bill" if always_on else ""
    return [
        *lines,
        *searches,
        PlanLine(
            "cost",
            f"training: up to {compute.max_instances} x {compute.size} while a job runs and "
            f"{compute.idle_time_before_scale_down} s after; {training}{always}",
        ),
        PlanLine("cost", _serving_cost(clients, endpoint)),
        PlanLine(
            "cost", "storage, container registry, key vault, logs: small charges, until --all"
        ),
    ]


def _serving_cost(clients: Clients, endpoint: EndpointSection) -> str:
    machines = f"{endpoint.instance_count} x {endpoint.instance_type}"
    size, count, region = endpoint.instance_type, endpoint.instance_count, clients.place.location
    price = clients.prices.hourly(size, region)
    each = clients.prices.text(size, count, region)
    rule = rule_text(endpoint, price.high * count if price else None)
    rule = f"; {rule}" if rule else ""
    if endpoint.deadline == NO_DEADLINE:
        return (
            f"endpoint: {machines} from `deploy` until `phi3 down --on azure`, used or not, "
            f"WITHOUT a deadline (azure.endpoint.deadline=none){rule}; {each}"
        )
    hours = duration_of(endpoint.deadline).total_seconds() / 3600
    most = f"at most {price.high * count * hours:.2f} USD, then it" if price else "then it"
    return (
        f"endpoint: {machines} from `deploy` until its deadline after {endpoint.deadline}, used or "
        f"not: {most} deletes itself (azure.endpoint.deadline){rule}; {each}"
    )


def _existing(clients: Clients, recipe: Recipe, run: Run) -> list[PlanLine]:
    """What exists already and what would be created, up to the first that cannot be looked for."""
    place, ml = clients.place, clients.ml
    cluster = recipe.azure.compute.name
    endpoint = endpoint_name(recipe.azure, place, run)
    workspaces = clients.subscription.workspaces
    lines: list[PlanLine] = []
    reads: tuple[tuple[str, str, str, Callable[[str], object]], ...] = (
        ("provision", "workspace", place.workspace_name, workspaces.get),
        ("provision", "cluster", cluster, ml.compute.get),
        ("deploy", "endpoint", endpoint, ml.online_endpoints.get),
    )
    for stage, what, name, read in reads:
        try:
            exists = find(what, name, read) is not None
        except StageError as error:  # the next would end the same way
            return [*lines, PlanLine(stage, str(error), stops=True)]
        then = "exists and is used" if exists else "would be created"
        lines.append(PlanLine(stage, f"{what} {name} {then}"))
    return lines
