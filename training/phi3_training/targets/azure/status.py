"""What exists in the workspace and what of it bills; what `up` would create. Changes nothing.

`status` shows it, `down` looks here for what still bills, `plan` says what would stop `up`. A part
that may not be read is reported as unknown, never taken for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...errors import StageError
from ...manifests import EndpointManifest, RegistrationManifest
from ...recipe import Recipe
from ...run import Run
from ..base import PlanLine
from .clients import Clients
from .cores import taking_turns
from .deploy import traffic_shares
from .failures import message_of
from .jobs import recorded_jobs
from .operations import find, is_absent, state_of
from .place import RUN_TAG, endpoint_name
from .sizes import price_of, quota_needs, quota_shortage, refuse_retired
from .train import choose_route

if TYPE_CHECKING:
    from azure.ai.ml.entities import Compute, OnlineEndpoint

T = TypeVar("T")
_SHOWN_JOBS = 5


@dataclass(frozen=True)
class Deployment:
    """One deployment: machines that bill for as long as it exists, whatever its state."""

    name: str
    state: str
    size: str
    count: int
    traffic: int  # percent
    model: str = ""


@dataclass(frozen=True)
class Endpoint:
    """An endpoint with its deployments; `owner` is the run that made it."""

    name: str
    state: str
    auth_mode: str
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


@dataclass
class Inventory:
    """All that was found, and what could not be read."""

    endpoints: list[Endpoint] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)
    jobs: list[tuple[str, str]] = field(default_factory=list)  # name, status
    models: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    group_exists: bool = True  # the resource group, and so what bills little
    region: str = ""

    def billing(self) -> list[str]:
        """A line for everything that bills by the hour now."""
        lines = []
        for endpoint in self.endpoints:
            for item in endpoint.deployments:
                price = price_of(item.size, item.count, self.region)
                mark = "" if item.state == "succeeded" else f", {item.state}: still bills"
                lines.append(
                    f"deployment {item.name} of {endpoint.name}: {item.count} x {item.size}{mark}; "
                    f"{price}"
                )
        for cluster in self.clusters:
            # A cluster bills for the nodes that it has, idle or not, until the idle time is over.
            count = cluster.nodes if cluster.nodes is not None else cluster.least
            if count:
                price = price_of(cluster.size, count, self.region)
                lines.append(f"cluster {cluster.name}: {count} x {cluster.size}; {price}")
            elif cluster.nodes is None:
                lines.append(f"cluster {cluster.name}: bills while it has nodes (not counted)")
        return lines

    def lines(self, run: Run) -> list[str]:
        """All of it for people, as the run sees it."""
        lines = [f"job {name}: {status}" for name, status in self.jobs]
        lines += [f"model {name}" for name in self.models[-_SHOWN_JOBS:]]
        for endpoint in self.endpoints:
            owner = (
                "" if endpoint.owner == run.name else f", owner {endpoint.owner or 'somebody else'}"
            )
            lines.append(f"endpoint {endpoint.name}: {endpoint.state}, {endpoint.auth_mode}{owner}")
            lines += [
                f"  deployment {item.name}: {item.state}, {item.traffic} % of the traffic, "
                f"{item.count} x {item.size}, {item.model}".rstrip(", ")
                for item in endpoint.deployments
            ]
        for cluster in self.clusters:
            nodes = "nodes unknown" if cluster.nodes is None else f"{cluster.nodes} nodes now"
            lines.append(
                f"cluster {cluster.name}: {cluster.state}, {cluster.size}, "
                f"{cluster.least} to {cluster.most} nodes, {nodes}"
            )
        billing = self.billing()
        lines += [f"bills now: {line}" for line in billing] or ["bills now: nothing by the hour"]
        if self.group_exists:
            lines.append("small charges: storage account, container registry, logs (until --all)")
        lines += [f"could not be read: {what}" for what in self.unknown]
        return lines


def take_inventory(clients: Clients, run: Run) -> Inventory:
    """Look at the workspace: everybody's endpoints and clusters, this run's jobs and models."""
    ml = clients.ml
    inventory = Inventory(region=clients.place.location)
    inventory.endpoints = [
        _endpoint(clients, item, inventory)
        for item in _read(inventory, "endpoints", ml.online_endpoints.list)
    ]
    inventory.clusters = [
        _cluster(clients, item)
        for item in _read(inventory, "clusters", ml.compute.list)
        # Other kinds are a person's own compute instances, attached machines and so on.
        if str(getattr(item, "type", "")).lower() == "amlcompute"
    ]
    # By name: a workspace may have thousands of jobs, and listing them takes pages.
    for name in [item.name for item in recorded_jobs(run).values()][-_SHOWN_JOBS:]:
        for job in _read(inventory, f"job {name}", partial(_listed, ml.jobs.get, name)):
            status = getattr(job, "status", None)
            inventory.jobs.append((name, str(getattr(status, "value", status))))
    groups, group = clients.resources.resource_groups, clients.place.resource_group
    listed = _read(inventory, "resource group", partial(_listed, groups.get, group))
    inventory.group_exists = bool(listed or inventory.unknown)
    registration = run.read(RegistrationManifest)
    if registration is not None:
        models = _read(inventory, "models", partial(ml.models.list, name=registration.model))
        # By number: as text, version 10 would come before version 9.
        models.sort(key=lambda m: (int(m.version) if str(m.version).isdecimal() else 0, m.version))
        inventory.models = [f"{item.name}:{item.version}" for item in models]
    return inventory


def _listed(get: Callable[[str], T], name: str) -> list[T]:
    return [get(name)]


def _endpoint(clients: Clients, item: OnlineEndpoint, inventory: Inventory) -> Endpoint:
    name = str(item.name)
    list_deployments = partial(clients.ml.online_deployments.list, name)
    shares = traffic_shares(item.traffic)
    deployments = tuple(
        Deployment(
            name=str(deployment.name),
            state=state_of(deployment),
            size=str(getattr(deployment, "instance_type", None)),
            count=int(deployment.instance_count or 1),
            traffic=shares.get(str(deployment.name), 0),
            model=model_label(deployment.model),
        )
        for deployment in _read(inventory, f"deployments of {name}", list_deployments)
    )
    return Endpoint(
        name=name,
        state=state_of(item),
        auth_mode=str(item.auth_mode),
        owner=(item.tags or {}).get(RUN_TAG),
        deployments=deployments,
    )


def model_label(model: object) -> str:
    """`name:version` out of a model's id."""
    text = str(model or "")
    parts = text.split("/")
    if "models" in parts and "versions" in parts:
        return f"{parts[parts.index('models') + 1]}:{parts[parts.index('versions') + 1]}"
    return text.removeprefix("azureml:")


def _cluster(clients: Clients, item: Compute) -> Cluster:
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
    )


def _read(inventory: Inventory, what: str, read: Callable[[], Iterable[T]]) -> list[T]:
    """What `read` gives; nothing where it does not exist, and a remark where it cannot be read."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    try:
        return list(read())
    except (AzureError, MlException) as error:
        if not is_absent(error):
            inventory.unknown.append(f"{what} ({message_of(error)[:120]})")
        return []


@dataclass(frozen=True)
class EndpointState:
    """`up` where the run's deployment is well and has traffic, `down` where not, or `none`."""

    state: Literal["up", "down", "none"]
    url: str = ""
    name: str = ""
    deployment: str = ""
    reason: str = ""  # why it is down

    def as_json(self) -> dict[str, str]:
        """What `-o json` shows: all that is known."""
        return {key: value for key, value in vars(self).items() if value}


def endpoint_state(clients: Clients, run: Run) -> EndpointState:
    """The current state of the run's endpoint."""
    manifest = run.read(EndpointManifest)
    if manifest is None:
        return EndpointState("none")
    name, deployment = manifest.endpoint_name, manifest.deployment
    state = partial(EndpointState, url=manifest.endpoint, name=name, deployment=deployment)
    ml = clients.ml
    endpoint = find("endpoint", name, ml.online_endpoints.get)
    if endpoint is None:
        return state("down", reason="the endpoint is gone")
    existing = find("deployment", deployment, lambda own: ml.online_deployments.get(own, name))
    if existing is None or state_of(existing) != "succeeded":
        how = "is gone" if existing is None else f"is {state_of(existing)}"
        return state("down", reason=f"the deployment {how}")
    # An endpoint without traffic rules answers 404, however well its deployment is.
    if not traffic_shares(endpoint.traffic).get(deployment):
        return state("down", reason="the deployment has no traffic")
    return state("up")


def status(clients: Clients, run: Run) -> dict[str, Any]:
    """The endpoint's state, and the lines for people."""
    inventory = take_inventory(clients, run)
    return {
        "endpoint": endpoint_state(clients, run).as_json(),
        "lines": inventory.lines(run),
        "bills": inventory.billing(),
    }


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
    # Azure is not queried when the recipe alone would stop `up`.
    if not any(line.stops for line in lines):
        lines += _existing(clients, recipe, run)
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
    training = price_of(compute.size, compute.max_instances, region)
    serving = price_of(endpoint.instance_type, endpoint.instance_count, region)
    # A cluster scales down to min_instances; an online deployment has no zero to scale to.
    always_on = compute.min_instances
    always = f"; {always_on} nodes stay on and always bill" if always_on else ""
    return [
        *lines,
        PlanLine(
            "cost",
            f"training: up to {compute.max_instances} x {compute.size} while a job runs and "
            f"{compute.idle_time_before_scale_down} s after; {training}{always}",
        ),
        PlanLine(
            "cost",
            f"endpoint: {endpoint.instance_count} x {endpoint.instance_type} from `deploy` until "
            f"`phi3 down --on azure`, used or not; {serving}",
        ),
        PlanLine(
            "cost", "storage, container registry, key vault, logs: small charges, until --all"
        ),
    ]


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
        except StageError as error:
            return [*lines, PlanLine(stage, str(error), stops=True)]
        then = "exists and is used" if exists else "would be created"
        lines.append(PlanLine(stage, f"{what} {name} {then}"))
    return lines
