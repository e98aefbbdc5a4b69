"""Makes what is missing on Azure, from the resource group to the GPU cluster.

Safe to repeat: every step looks first and says exists, created or failed. Quota comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from ...console import ProgressCallback
from ...errors import StageError
from ...recipe import Recipe
from ...recipe_azure import AzureSection
from . import quota
from .clients import Clients
from .cluster import ensure_cluster
from .dependents import Dependents, dependents_of, ensure_dependents
from .roles import grant, grants
from .waiting import look, make, state_of

PARTS = ("workspace", "roles", "project", "cluster")


@dataclass(frozen=True)
class Step:
    """What became of one thing."""

    what: str
    name: str
    state: str  # exists, created, failed or skipped
    detail: str = ""

    def text(self) -> str:
        """One line for a person."""
        tail = f": {self.detail}" if self.detail else ""
        return f"{self.state:<8} {self.what} {self.name}{tail}"


@dataclass
class Provisioned:
    """The steps, and the ids that the other stages use."""

    steps: list[Step] = field(default_factory=list)
    identity_id: str | None = None
    principal_id: str | None = None
    dependents: Dependents | None = None

    @property
    def failed(self) -> list[Step]:
        """Steps that Azure refused."""
        return [step for step in self.steps if step.state == "failed"]

    def created(self) -> list[str]:
        """What was made now."""
        return [f"{step.what} {step.name}" for step in self.steps if step.state == "created"]

    def manifest(self) -> dict[str, Any]:
        """What the run folder keeps of it: names and ids."""
        made = self.created()
        there = len(self.steps) - len(made)
        return {
            "target": "azure",
            "steps": [asdict(step) for step in self.steps],
            "identity_id": self.identity_id,
            "principal_id": self.principal_id,
            **(asdict(self.dependents) if self.dependents else {}),
            "summary": f"{len(made)} made, {there} there already",
            "choices": [f"made: {name}" for name in made],
        }


Report = Callable[[Step], None]


def provision(
    clients: Clients,
    recipe: Recipe,
    progress: ProgressCallback,
    report: Report = lambda _step: None,
    *,
    parts: Iterable[str] = PARTS,
) -> Provisioned:
    """Make what is missing of `parts`. StageError that names every step that failed."""
    work = _Work(clients, recipe, progress, report)
    wanted = set(parts)
    if "cluster" in wanted:
        work.check_quota()
    work.workspace()
    if work.ready("workspace") and wanted & {"roles", "project"}:
        work.identity()
        if "project" in wanted:
            work.hub_and_project()
        if "roles" in wanted:
            work.roles(with_project="project" in wanted)
    if "cluster" in wanted:
        work.cluster()
    if work.done.failed:
        lines = "\n".join(f"  {step.text()}" for step in work.done.failed)
        raise StageError(
            f"Not everything could be provisioned:\n{lines}\nWhat was made stays; after mending, "
            "go on with the same command (phi3 azure provision shows every step)"
        )
    return work.done


class _Work:
    """One pass over the steps."""

    def __init__(
        self, clients: Clients, recipe: Recipe, progress: ProgressCallback, report: Report
    ) -> None:
        self.clients = clients
        self.place = clients.workplace
        self.recipe = recipe
        self.progress = progress
        self.report = report
        self.done = Provisioned()
        self.limit = clients.poll.provision_timeout
        self.pause = clients.poll.interval

    def step(self, what: str, name: str, work: Callable[[], str]) -> bool:
        """Do one step; whether what it makes is there afterwards."""
        self.progress(0, 0, f"{what} {name}")
        try:
            found = Step(what, name, work())
        except StageError as error:
            found = Step(what, name, "failed", " ".join(str(error).split()))
        self.done.steps.append(found)
        self.report(found)
        return found.state != "failed"

    def ready(self, what: str) -> bool:
        """Whether the step about `what` went well."""
        return any(s.what == what and s.state in ("exists", "created") for s in self.done.steps)

    def check_quota(self) -> None:
        """Before anything is made: do the cluster and the endpoint fit into the quota?"""
        name = self.recipe.azure.compute.name
        if look(lambda: self.clients.ml.compute.get(name), f"Looking for the cluster {name}"):
            return  # what it uses is part of what is used
        self.progress(0, 0, "quota of the GPU family")
        train, serve = quota.needs(self.clients, self.recipe)
        # The cluster gives its cores back before the endpoint needs them.
        short = quota.lacking([train]) + quota.lacking([serve], of_limit=True)
        quota.refuse_lacking(short)

    def workspace(self) -> None:
        """The group, what the workspace consists of, and the workspace."""
        place, ml = self.place, self.clients.subscription
        doing = f"Looking for the workspace {place.workspace_name}"
        found = look(lambda: ml.workspaces.get(place.workspace_name), doing)
        if found is not None and not _being_deleted(found):
            self._adopt(found)
            return
        if not self.step("resource group", place.resource_group, self._group):
            return
        made = ensure_dependents(self.clients, self._tags(), self.progress, self.step)
        self.done.dependents = made
        if made is not None:
            self.step("workspace", place.workspace_name, self._make_workspace)

    def _adopt(self, workspace: Any) -> None:
        """A workspace that is there, by whomever, with what it has."""
        place = self.place
        self.step("resource group", place.resource_group, lambda: "exists")
        found = dependents_of(workspace, place)
        for what, name in found.named():
            self.step(what, name, lambda: "exists")
        self.done.dependents = found

        def check() -> str:
            where = str(workspace.location or place.location).replace(" ", "").lower()
            if where == place.location:
                return "exists"
            raise StageError(
                f"it is in {where}, not in {place.location}. Mend: set azure.location={where}"
            )

        self.step("workspace", place.workspace_name, check)

    def _group(self) -> str:
        groups, place = self.clients.resources.resource_groups, self.place
        doing = f"Making the resource group {place.resource_group}"
        found = look(lambda: groups.get(place.resource_group), doing)
        if found is not None:
            return "exists"
        body: Any = {"location": place.location, "tags": self._tags()}
        make(
            doing,
            lambda: groups.create_or_update(place.resource_group, body),
            lambda: groups.get(place.resource_group),
            self.progress,
            limit=self.limit,
            pause=self.pause,
        )
        return "created"

    def _make_workspace(self) -> str:
        from azure.ai.ml.entities import Workspace

        made = self.done.dependents
        assert made is not None  # noqa: S101 - `workspace` has just made them
        body = Workspace(
            name=self.place.workspace_name,
            location=self.place.location,
            resource_group=self.place.resource_group,
            description="Made by phi3-promptflow",
            tags=self._tags(),
            **_untyped(made),
        )
        self._make("workspace", self.place.workspace_name, body)
        return "created"

    def _make(self, what: str, name: str, body: Any) -> None:
        """Workspace, hub and project are the same kind of thing to Azure."""
        workspaces = self.clients.subscription.workspaces
        make(
            f"Making the {what} {name}",
            lambda: workspaces.begin_create(body),
            lambda: workspaces.get(name),
            self.progress,
            limit=self.limit,
            pause=self.pause,
        )

    def identity(self) -> None:
        """The identity that the deployment runs as."""
        place = self.place

        def ensure() -> str:
            operations = self.clients.identities.user_assigned_identities
            doing = f"Making the identity {place.identity}"

            def read() -> Any:
                return operations.get(place.resource_group, place.identity)

            found, state = look(read, doing), "exists"
            if found is None:
                body: Any = {"location": place.location, "tags": self._tags()}
                found = make(
                    doing,
                    lambda: operations.create_or_update(place.resource_group, place.identity, body),
                    read,
                    self.progress,
                    limit=self.limit,
                    pause=self.pause,
                )
                state = "created"
            self.done.identity_id, self.done.principal_id = found.id, found.principal_id
            return state

        self.step("identity", place.identity, ensure)

    def hub_and_project(self) -> None:
        """The Foundry hub, on the workspace's own storage and vault, and a project in it."""
        from azure.ai.ml.entities import Hub, Project

        place, made = self.place, self.done.dependents
        arguments = _untyped(made) if made is not None else {}
        common: dict[str, Any] = {
            "location": place.location,
            "resource_group": place.resource_group,
        }
        hub = Hub(name=place.hub, tags=self._tags(), **common, **arguments)
        if self.step("hub", place.hub, lambda: self._ensure("hub", place.hub, hub)):
            project = Project(
                name=place.project,
                hub_id=place.workspace_id(place.hub),
                tags=self._tags(),
                **common,
            )
            self.step(
                "project", place.project, lambda: self._ensure("project", place.project, project)
            )

    def _ensure(self, what: str, name: str, body: Any) -> str:
        doing = f"Looking for the {what} {name}"
        workspaces = self.clients.subscription.workspaces
        found = look(lambda: workspaces.get(name), doing)
        if found is not None and not _being_deleted(found):
            return "exists"
        self._make(what, name, body)
        return "created"

    def roles(self, *, with_project: bool) -> None:
        """What the identity may do."""
        made, principal = self.done.dependents, self.done.principal_id
        if made is None or principal is None:
            return
        connections = [self.place.workspace_id()]
        if with_project and self.ready("project"):
            connections.append(self.place.workspace_id(self.place.project))
        for wanted in grants(
            principal,
            group=self.place.group_scope,
            storage=made.storage_account,
            registry=made.container_registry,
            connections=connections,
            least_privilege=self.recipe.azure.least_privilege,
        ):
            on = wanted.scope.rstrip("/").rsplit("/", 1)[-1]
            self.step("role", f"{wanted.role} on {on}", partial(grant, self.clients, wanted))

    def cluster(self) -> None:
        """The GPU cluster; it bills only while it has nodes."""
        section = self.recipe.azure.compute
        if not self.ready("workspace"):
            self.done.steps.append(Step("cluster", section.name, "skipped", "no workspace"))
            return
        self.step(
            "cluster",
            section.name,
            lambda: ensure_cluster(self.clients, section, self._tags(), self.progress),
        )

    def _tags(self) -> dict[str, str]:
        return {"created-by": "phi3-promptflow", **self.recipe.azure.tags}


def _untyped(made: Dependents) -> dict[str, Any]:
    """As keyword arguments of a class that takes many other kinds as well."""
    return dict(made.as_arguments())


def _being_deleted(workspace: Any) -> bool:
    return str(getattr(workspace, "provisioning_state", "")).lower() in ("deleting", "softdeleted")


def standing(clients: Clients, section: AzureSection, *, parts: Iterable[str] = PARTS) -> bool:
    """Whether what `provision` makes is still there; roles are taken to stand with their scopes."""
    place, wanted = clients.workplace, set(parts)
    names = [place.workspace_name]
    if "project" in wanted:
        names += [place.hub, place.project]
    workspaces = clients.subscription.workspaces
    for name in names:
        doing = f"Looking for the workspace {name}"
        found = look(partial(workspaces.get, name), doing)
        if found is None or _being_deleted(found):
            return False
    if wanted & {"roles", "project"}:
        identities = clients.identities.user_assigned_identities
        read = partial(identities.get, place.resource_group, place.identity)
        if look(read, f"Looking for the identity {place.identity}") is None:
            return False
    if "cluster" in wanted:
        name = section.compute.name
        cluster = look(lambda: clients.ml.compute.get(name), f"Looking for the cluster {name}")
        return cluster is not None and state_of(cluster) not in ("failed", "deleting")
    return True
