"""How a run stands on Azure, and what `up` would create and cost. Changes nothing.

`status` shows the run's own part here, and what a workspace's runs share by inventory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from ...errors import StageError
from ...manifests import EndpointManifest, RegistrationManifest
from ...recipe import Recipe
from ...recipe.azure import NO_DEADLINE, EndpointSection, duration_of
from ...run import Run
from ..base import PlanLine
from .clients import Clients
from .cores import taking_turns
from .deploy import traffic_shares
from .inventory import Inventory, read_all
from .jobs import recorded_jobs
from .operations import find, state_of
from .place import endpoint_name
from .removals import rule_text
from .rollout import plan_lines
from .search_service import made_services
from .sizes import quota_needs, quota_shortage, refuse_retired
from .train import choose_route

T = TypeVar("T")
_SHOWN = 5  # jobs and models


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


def status(clients: Clients, run: Run, inventory: Inventory) -> dict[str, Any]:
    """The run's part: its endpoint's state, lines for people, and what of its own bills."""
    lines = [f"job {name}: {state}" for name, state in _jobs(clients, run, inventory)]
    lines += [f"model {name}" for name in _models(clients, run, inventory)[-_SHOWN:]]
    for endpoint in inventory.endpoints:
        lines += endpoint.lines() if endpoint.owner == run.name else []
    return {
        "endpoint": endpoint_state(clients, run).as_json(),
        "lines": lines,
        "bills": [bill.text for bill in inventory.bills(run.name)],
    }


def _jobs(clients: Clients, run: Run, inventory: Inventory) -> list[tuple[str, str]]:
    """Name and status of the run's last jobs."""
    found = []
    # By name: a workspace may have thousands of jobs, and listing them takes pages.
    for name in [item.name for item in recorded_jobs(run).values()][-_SHOWN:]:
        for job in read_all(inventory, f"job {name}", partial(_listed, clients.ml.jobs.get, name)):
            state = getattr(job, "status", None)
            found.append((name, str(getattr(state, "value", state))))
    return found


def _listed(get: Callable[[str], T], name: str) -> list[T]:
    return [get(name)]


def _models(clients: Clients, run: Run, inventory: Inventory) -> list[str]:
    """The versions of the run's model, oldest first."""
    registration = run.read(RegistrationManifest)
    if registration is None:
        return []
    list_models = partial(clients.ml.models.list, name=registration.model)
    models = read_all(inventory, "models", list_models)
    # By number: as text, version 10 would come before version 9.
    models.sort(key=lambda m: (int(m.version) if str(m.version).isdecimal() else 0, m.version))
    return [f"{item.name}:{item.version}" for item in models]


def overview(clients: Clients, inventory: Inventory, shown_runs: Sequence[str]) -> dict[str, Any]:
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
        searches = _search_cost(clients)
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


def _search_cost(clients: Clients) -> list[PlanLine]:
    """What the search services cost that `phi3 rag index` made; no recipe makes one."""
    try:
        return [PlanLine("cost", each.text()) for each in made_services(clients)]
    except StageError as error:
        return [PlanLine("cost", f"search services that phi3 made: unknown ({error})")]


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
        except StageError as error:
            return [*lines, PlanLine(stage, str(error), stops=True)]
        then = "exists and is used" if exists else "would be created"
        lines.append(PlanLine(stage, f"{what} {name} {then}"))
    return lines
