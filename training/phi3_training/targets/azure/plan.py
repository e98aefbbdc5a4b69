"""`plan` on Azure: what `up` would make, what of it bills per hour, and what would stop it.

Reads the recipe, the run folder and Azure; changes nothing.
"""

from __future__ import annotations

from ...errors import StageError
from ...recipe import Recipe
from ...run import Run
from ..base import PlanLine
from . import quota
from .clients import Clients
from .names import endpoint_name
from .prices import price_of
from .routes import choose
from .sizes import refuse_retired
from .waiting import look


def plan(clients: Clients, recipe: Recipe, run: Run) -> list[PlanLine]:
    """The lines; each thing that would stop `up` is one of its own."""
    place = clients.workplace
    lines = [PlanLine("place", line) for line in place.lines()]
    lines += [*_sizes(recipe), *_route(clients, recipe)]
    if not any(line.stops for line in lines):
        lines += _standing(clients, recipe, run)
        lines += _quota(clients, recipe)
    return [*lines, *_costs(clients, recipe)]


def _sizes(recipe: Recipe) -> list[PlanLine]:
    found = []
    for stage, key, size in (
        ("provision", "azure.compute.size", recipe.azure.compute.size),
        ("deploy", "azure.endpoint.instance_type", recipe.azure.endpoint.instance_type),
    ):
        try:
            refuse_retired(size, key)
        except StageError as error:
            found.append(PlanLine(stage, str(error), stops=True))
    return found


def _route(clients: Clients, recipe: Recipe) -> list[PlanLine]:
    """How it would be tuned and why; what the catalogue does not offer any more stops it."""
    try:
        choice = choose(clients, recipe)
    except StageError as error:
        return [PlanLine("finetune", str(error), stops=True)]
    return [PlanLine("finetune", f"route {choice.route}: {choice.reason}")]


def _standing(clients: Clients, recipe: Recipe, run: Run) -> list[PlanLine]:
    """What is there already and what would be made."""
    place, ml = clients.workplace, clients.ml
    cluster = recipe.azure.compute.name
    endpoint = endpoint_name(recipe.azure, place, run)
    found: list[PlanLine] = []
    for stage, what, name, read in (
        (
            "provision",
            "workspace",
            place.workspace_name,
            lambda: clients.subscription.workspaces.get(place.workspace_name),
        ),
        ("provision", "cluster", cluster, lambda: ml.compute.get(cluster)),
        ("deploy", "endpoint", endpoint, lambda: ml.online_endpoints.get(endpoint)),
    ):
        try:
            there = look(read, f"Looking for the {what} {name}") is not None
        except StageError as error:
            return [*found, PlanLine(stage, str(error), stops=True)]
        said = "is there and is used" if there else "would be made"
        found.append(PlanLine(stage, f"{what} {name} {said}"))
    return found


def _quota(clients: Clients, recipe: Recipe) -> list[PlanLine]:
    try:
        train, serve = quota.needs(clients, recipe)
    except StageError as error:
        return [PlanLine("quota", str(error), stops=True)]
    short = quota.lacking([train]) + quota.lacking([serve], of_limit=True)
    return [PlanLine("quota", need.text(), stops=need in short) for need in (train, serve)]


def _costs(clients: Clients, recipe: Recipe) -> list[PlanLine]:
    compute, endpoint = recipe.azure.compute, recipe.azure.endpoint
    region = clients.workplace.location
    training = price_of(compute.size, compute.max_instances, region)
    serving = price_of(endpoint.instance_type, endpoint.instance_count, region)
    idle = compute.idle_time_before_scale_down
    always = (
        f"; {compute.min_instances} nodes stay on and bill all the time"
        if compute.min_instances
        else ""
    )
    return [
        PlanLine(
            "cost",
            f"training: up to {compute.max_instances} x {compute.size} while a job runs and "
            f"{idle} s after; {training.text()}{always}",
        ),
        PlanLine(
            "cost",
            f"endpoint: {endpoint.instance_count} x {endpoint.instance_type} from `deploy` until "
            f"`phi3 down --on azure`, used or not; {serving.text()}",
        ),
        PlanLine("cost", "storage, container registry, key vault, logs: little, until --all"),
    ]
