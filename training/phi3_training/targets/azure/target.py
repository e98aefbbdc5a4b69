"""Azure Machine Learning as target: thin methods; each stage's work is in its own module.

Reads and writes the run folder's manifests; signs in at the first call that needs Azure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ... import console
from ...errors import MissingExtraError, RecipeError, StageError
from ...flow.bundle import Bundle
from ...manifests import (
    AnswerManifest,
    BaseManifest,
    ConnectionManifest,
    EndpointManifest,
    Manifest,
    MetricsManifest,
    ModelManifest,
    ProvisionManifest,
    RegistrationManifest,
    RolloutManifest,
)
from ...progress import Progress, no_progress, note
from ...recipe import Recipe, azure_section_of
from ...recipe.azure import AzureSection
from ...run import Run
from ..base import Access, Overview, PlanLine, RunStatus
from .clients import Clients
from .place import (
    AZURE,
    WITHOUT_REDEPLOYMENT,
    Place,
    endpoint_name,
    find_place,
    place_of,
    section_of,
    settle,
)
from .provision import PARTS, is_provisioned, provision

if TYPE_CHECKING:
    from .prompt_flow import PushedFlow
    from .status import Inventory
    from .teardown import Found

# What the extra `azure` installs, one module of each package that is used.
NEEDED_MODULES = (
    "azure.ai.ml",
    "azure.identity",
    "azure.mgmt.authorization",
    "azure.mgmt.msi",
    "azure.mgmt.quota",
    "azure.mgmt.resource",
    "azure.storage.blob",
)


class AzureTarget:
    """The journey on Azure ML. One sign-in serves all stages; keys stay in memory."""

    name = AZURE

    def __init__(self, clients: Clients | None = None) -> None:
        refuse_without_extra()
        self._clients = clients
        self._seen: dict[str, Inventory] = {}

    @property
    def cloud(self) -> AzureTarget:
        """Itself: all of it is away from this machine."""
        return self

    def clients(self, recipe: Recipe) -> Clients:
        """The clients for the place that the recipe, the environment or config.json name."""
        if self._clients is None:
            place = find_place(recipe.azure, os.environ, Path.cwd())
            self._clients = Clients(place, recipe.azure.poll)
        return self._clients

    def _of(self, run: Run) -> tuple[Clients, AzureSection]:
        """The clients for where the run is, and the section that it was made with."""
        section, place = section_of(run), place_of(run)
        # Another place needs other clients, but no second sign-in, which may open a browser.
        if self._clients is None or self._clients.place.workspace_id() != place.workspace_id():
            credential = None if self._clients is None else self._clients.credential
            self._clients = Clients(place, section.poll, credential)
        return self._clients, section

    def begin(self, recipe: Recipe, run: Run) -> None:
        """Write down where the run is. UsageError where it is elsewhere already."""
        place = settle(recipe.azure, run)
        if self._clients is None:
            self._clients = Clients(place, recipe.azure.poll)

    def plan(self, recipe: Recipe, run: Run) -> list[PlanLine]:
        """What `up` would make and cost, and what would stop it."""
        from .status import plan

        return plan(self.clients(recipe), recipe, run)

    def provide(
        self, recipe: Recipe, run: Run, progress: Progress, *, trains: bool
    ) -> ProvisionManifest:
        """Provision what the rest of the journey needs. Safe to repeat."""
        from .train import send_ahead

        clients = self.clients(recipe)
        ahead = partial(send_ahead, clients, recipe, run) if trains else None
        return provision(clients, recipe, progress, parts=_parts(trains), ahead=ahead).manifest()

    def is_provided(self, recipe: Recipe, run: Run, *, trains: bool) -> bool:
        """Whether it still exists."""
        del run
        return is_provisioned(self.clients(recipe), recipe.azure, parts=_parts(trains))

    def inputs(self, recipe: Recipe, stage: type[Manifest], shared: object) -> object:
        """What a stage depends on here: also its part of the `azure:` section."""
        section = recipe.azure
        # Left out is what changes nothing that a stage has made: tags, waits, the tenant.
        own: dict[type[Manifest], object] = {
            ProvisionManifest: section.model_dump(
                mode="json", exclude={"train", "endpoint", "poll", "tags", "tenant_id"}
            ),
            ModelManifest: section.train.model_dump(mode="json"),
            MetricsManifest: section.train.model_dump(
                mode="json", include={"route", "environment"}
            ),
            EndpointManifest: section.endpoint.model_dump(
                mode="json", exclude={"name", *WITHOUT_REDEPLOYMENT}
            ),
        }
        return [shared, own.get(stage)]

    def prepare_base(self, recipe: Recipe, run: Run, progress: Progress) -> BaseManifest:
        """Say which model is tuned, and by which route."""
        from .train import prepare_base

        return prepare_base(self.clients(recipe), recipe, run, progress)

    def train(
        self, recipe: Recipe, run: Run, progress: Progress, *, deploys: bool = False
    ) -> ModelManifest:
        """Fine-tune in a job, or resume the one that runs."""
        from .train import finetune

        clients = self.clients(recipe)
        if not deploys:
            return finetune(clients, recipe, run, progress)
        name = endpoint_name(recipe.azure, clients.place, run)

        def make_endpoint(shown: Progress) -> None:
            """The endpoint: without a deployment it costs nothing, and it takes minutes."""
            from .deploy import ensure_endpoint  # imported while the job is at work

            ensure_endpoint(clients, recipe.azure, run, name, shown)

        return finetune(clients, recipe, run, progress, make_endpoint)

    def evaluate(self, recipe: Recipe, run: Run, progress: Progress) -> MetricsManifest:
        """Bring back what was measured in a job."""
        from .train import evaluate

        return evaluate(self.clients(recipe), recipe, run, progress)

    def register(self, recipe: Recipe, run: Run) -> RegistrationManifest:
        """Register the job's model in the workspace."""
        from .register import register

        return register(self.clients(recipe), recipe, run)

    def deploy(self, recipe: Recipe, run: Run, progress: Progress) -> EndpointManifest:
        """Bring the registered model up at the run's endpoint."""
        from .deploy import deploy

        return deploy(self.clients(recipe), recipe, run, progress)

    def is_up(self, recipe: Recipe, run: Run) -> bool:
        """Whether the run's deployment is well and has traffic, and no rollout is unfinished."""
        from .status import endpoint_state

        del recipe
        # Then the traffic is between two states, and `deploy` has to end that.
        rollout = run.read(RolloutManifest)
        if rollout is not None and rollout.unfinished:
            return False
        return endpoint_state(self._of(run)[0], run).state == "up"

    def is_connected(self, run: Run) -> bool:
        """Whether the run's connections still point to its endpoint."""
        from .prompt_flow import is_connected

        return is_connected(self._of(run)[0], run)

    def connect(self, recipe: Recipe, run: Run, progress: Progress) -> ConnectionManifest:
        """Write the Prompt flow connections here, in the workspace and in the project."""
        from .prompt_flow import connect

        return connect(self.clients(recipe), recipe, run, progress)

    def ask(self, flow: Path, recipe: Recipe, run: Run, progress: Progress) -> AnswerManifest:
        """The answer through each connection that was written: here and in the workspaces."""
        from ...data import question_of
        from ...flow.ask import ask
        from .prompt_flow import stored_connections

        question, answers = question_of(recipe, run), {}
        for place, connection in stored_connections(self._of(run)[0], run).items():
            note(progress, f"asking through the connection of {place}")
            answers[place] = ask(flow, question, connection=connection)
        return AnswerManifest(
            question=question,
            answer=next(iter(answers.values())),
            asked_through=list(answers),
        )

    def access(self, run: Run) -> Access:
        """How to reach the run's endpoint; the key is fetched now."""
        from .deploy import access_to

        endpoint = run.require(EndpointManifest)
        return access_to(self._of(run)[0], endpoint.endpoint_name)

    def key(self, run: Run) -> str | None:
        """The endpoint's key, fetched now; None where it takes Entra tokens."""
        return self.access(run).key

    def status(self, run: Run) -> RunStatus:
        """What exists in the run's workspace, and what bills."""
        from .status import status

        clients, _section = self._of(run)
        return status(clients, run, self._inventory(clients))

    def _inventory(self, clients: Clients) -> Inventory:
        """What the workspace has; looked at once for all the runs that one command shows."""
        from .status import take_inventory

        key = clients.place.workspace_id().lower()
        if key not in self._seen:
            self._seen[key] = take_inventory(clients)
        return self._seen[key]

    def overview(
        self, runs: Sequence[Run], named: Mapping[str, str], *, search: bool
    ) -> list[Overview]:
        """What each workspace has and costs, once: the runs', and those phi3's tags lead to."""
        from .status import overview

        places: dict[str, tuple[Place, list[str]]] = {}
        for run in runs:
            try:
                place = place_of(run)
            except StageError:  # begun elsewhere, or not yet
                continue
            places.setdefault(place.workspace_id().lower(), (place, []))[1].append(run.name)
        try:
            known = [place for place, _ in places.values()]
            for place in self._places(named, known) if search else ():
                places.setdefault(place.workspace_id().lower(), (place, []))
        except StageError as error:
            if not places:
                raise
            console.note(f"other workspaces are not shown: {error}")
        result = []
        groups: set[str] = set()
        for place, names in places.values():
            clients = self._at(place)
            inventory, group = self._inventory(clients), place.group_scope.lower()
            if group in groups:  # what is the group's is counted with its first workspace
                inventory = replace(inventory, searches=[])
            groups.add(group)
            result.append(overview(clients, inventory, names))
        return result

    def found(self, named: Mapping[str, str]) -> list[Found]:
        """The workspaces that `named` means, with what phi3 made there. UsageError for none."""
        from .teardown import Found

        near = find_place(azure_section_of(named), os.environ, Path.cwd())
        return [Found(self._at(place)) for place in self._places(named, [near])]

    def _places(self, named: Mapping[str, str], known: Sequence[Place]) -> list[Place]:
        """The named workspace; else those of each known subscription that phi3's tags lead to."""
        from .teardown import find_places

        try:
            near = [find_place(azure_section_of(named), os.environ, Path.cwd())]
        except RecipeError:
            if named:
                raise
            near = []  # nothing names a subscription now; the runs know theirs
        if "workspace_name" in named:
            return near
        subscriptions = {place.subscription_id: place for place in (*known, *near)}
        group = named.get("resource_group")
        return [
            place
            for one in subscriptions.values()
            for place in find_places(self._at(one))
            if group is None or place.resource_group.lower() == group.lower()
        ]

    def _at(self, place: Place) -> Clients:
        """The clients for a place, with the sign-in that there is."""
        credential = None if self._clients is None else self._clients.credential
        poll = AzureSection().poll if self._clients is None else self._clients.poll
        made = Clients(place, poll, credential)
        self._clients = self._clients or made
        return made

    def teardown(self, run: Run) -> list[str]:
        """Delete the run's endpoint and cluster."""
        return self.remove(run, "run", no_progress)

    def all_of(self, run: Run) -> list[str]:
        """What `remove` with "all" would delete."""
        from .teardown import names_of_everything

        return names_of_everything(self._of(run)[0])

    def remove(self, run: Run, only: str, progress: Progress) -> list[str]:
        """Delete and wait; the receipt."""
        from .teardown import remove_run

        clients, section = self._of(run)
        return remove_run(clients, section, run, only, progress)

    def push(self, run: Run, bundle: Bundle, to: str, progress: Progress) -> list[PushedFlow]:
        """Make a flow of the bundle in the workspace, the project, or both."""
        from .prompt_flow import push_flow

        clients, _section = self._of(run)
        place = clients.place
        named = {"workspace": [place.workspace_name], "project": [place.project]}
        workspaces = named.get(to, [place.workspace_name, place.project])
        return [push_flow(clients, run, bundle, name, progress) for name in workspaces]


def refuse_without_extra(modules: Sequence[str] = NEEDED_MODULES) -> None:
    """Raise MissingExtraError where a package of the extra `azure` is not installed."""
    # Looked for, not imported: azure.ai.ml alone takes seconds.
    for module in modules:
        try:
            spec = find_spec(module)
        except ModuleNotFoundError:  # a parent package is missing
            spec = None
        if spec is None:
            raise MissingExtraError(module, "azure")


def _parts(trains: bool) -> list[str]:
    return [part for part in PARTS if trains or part != "cluster"]


def clients_at(section: AzureSection) -> Clients:
    """Azure at the place that the keys, the environment and config.json name; no sign-in yet.

    Raises MissingExtraError where the extra `azure` is not installed.
    """
    refuse_without_extra()
    return Clients(find_place(section, os.environ, Path.cwd()), section.poll)


def clients_of(run: Run) -> Clients:
    """Azure at the place where a run is; no sign-in yet. Raises as `clients_at` does."""
    refuse_without_extra()
    return Clients(place_of(run), section_of(run).poll)
