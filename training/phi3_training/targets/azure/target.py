"""Azure Machine Learning as target: thin methods; each stage's work is in its own module.

Reads and writes the run folder's manifests; signs in at the first call that needs Azure.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import MissingExtraError
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
)
from ...progress import Progress, no_progress, note
from ...recipe import Recipe
from ...recipe.azure import AzureSection
from ...run import Run
from ..base import Access, PlanLine
from .clients import Clients
from .place import AZURE, endpoint_name, find_place, place_of, section_of, settle
from .provision import PARTS, is_provisioned, provision

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
        del run
        parts = _parts(trains)
        return provision(self.clients(recipe), recipe, progress, parts=parts).manifest()

    def is_provided(self, recipe: Recipe, run: Run, *, trains: bool) -> bool:
        """Whether it still exists."""
        del run
        return is_provisioned(self.clients(recipe), recipe.azure, parts=_parts(trains))

    def inputs(self, recipe: Recipe, stage: type[Manifest], shared: Any) -> Any:
        """What a stage depends on here: also its part of the `azure:` section."""
        section = recipe.azure
        own: dict[type[Manifest], Any] = {
            ProvisionManifest: section.model_dump(
                mode="json", exclude={"train", "endpoint", "poll", "tags", "tenant_id"}
            ),
            ModelManifest: section.train.model_dump(mode="json"),
            MetricsManifest: section.train.model_dump(
                mode="json", include={"route", "environment"}
            ),
            EndpointManifest: section.endpoint.model_dump(
                mode="json", exclude={"keep_deployments", "name"}
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
        from .deploy import ensure_endpoint

        name = endpoint_name(recipe.azure, clients.place, run)
        # It costs nothing while it has no deployment, and takes minutes to be there.
        beside = partial(ensure_endpoint, clients, recipe.azure, run, name)
        return finetune(clients, recipe, run, progress, beside)

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
        """Whether the run's deployment is well and has the traffic."""
        from .status import endpoint_state

        del recipe
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

    def status(self, run: Run) -> dict[str, Any]:
        """What exists in the run's workspace, and what bills."""
        from .status import status

        return status(self._of(run)[0], run)

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

    def push(self, run: Run, bundle: Bundle, to: str, progress: Progress) -> list[dict[str, Any]]:
        """Make a flow of the bundle in the workspace, the project, or both."""
        from .prompt_flow import push_flow

        clients, _section = self._of(run)
        place = clients.place
        named = {"workspace": [place.workspace_name], "project": [place.project]}
        workspaces = named.get(to, [place.workspace_name, place.project])
        return [asdict(push_flow(clients, run, bundle, name, progress)) for name in workspaces]


def refuse_without_extra(modules: Sequence[str] = NEEDED_MODULES) -> None:
    """Raise MissingExtraError where a package of the extra `azure` is not installed."""
    for module in modules:
        try:
            spec = find_spec(module)
        except ModuleNotFoundError:  # a parent package is missing
            spec = None
        if spec is None:
            raise MissingExtraError(module, "azure")


def _parts(trains: bool) -> list[str]:
    return [part for part in PARTS if trains or part != "cluster"]
