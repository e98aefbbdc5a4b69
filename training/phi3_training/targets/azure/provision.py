"""Creates what is missing on Azure, from the resource group to the GPU cluster.

Safe to repeat: every step looks first and says exists, created or failed. Quota comes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ...errors import StageError
from ...manifests import ProvisionManifest
from ...progress import Progress, note
from ...recipe import Recipe
from ...recipe.azure import AzureSection, ComputeSection
from .clients import Clients
from .operations import (
    Outcome,
    create,
    find,
    get_or_none,
    paced,
    side_by_side,
    state_of,
    wait_until_ready,
)
from .place import AZURE, resource_tags
from .resources import (
    SECRETS_READER,
    Dependents,
    Grant,
    dependents_of,
    ensure_dependents,
    ensure_grant,
    ensure_group,
    grants,
)
from .sizes import find_size, quota_needs, quota_shortage, refuse_shortage

if TYPE_CHECKING:
    from azure.ai.ml.entities import Workspace

# The cluster is left out once nothing is left to train or to measure.
PARTS = ("workspace", "roles", "project", "cluster")
_WORKSPACE_API = "2025-12-01"


@dataclass(frozen=True)
class Step:
    """What became of one resource."""

    what: str
    name: str
    state: Outcome | Literal["failed", "skipped"]
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

    def manifest(self) -> ProvisionManifest:
        """What the run folder keeps of it: names and ids."""
        created = [f"{step.what} {step.name}" for step in self.steps if step.state == "created"]
        existed = len(self.steps) - len(created)
        return ProvisionManifest(
            target=AZURE,
            steps=[asdict(step) for step in self.steps],
            identity_id=self.identity_id,
            principal_id=self.principal_id,
            **(asdict(self.dependents) if self.dependents else {}),
            summary=f"{len(created)} created, {existed} existed",
            choices=[f"created: {name}" for name in created],
        )


StepCallback = Callable[[Step], None]


def provision(
    clients: Clients,
    recipe: Recipe,
    progress: Progress,
    on_step: StepCallback = lambda _step: None,
    *,
    parts: Iterable[str] = PARTS,
    ahead: Callable[[Progress], None] | None = None,
) -> Provisioned:
    """Create what is missing of `parts`. StageError that names every step that failed.

    `ahead` is done as soon as there is a workspace, in parallel with what takes minutes.
    """
    work = _Provisioning(clients, recipe, progress, on_step)
    wanted = set(parts)
    # GPU families start with a quota of 0, so this is what stops most first runs: better now than
    # after everything else was created.
    if "cluster" in wanted:
        work.check_quota()
    work.ground(with_identity=bool(wanted & {"roles", "project"}))
    # The hub stands on the same storage and vault as the workspace, and does not need it.
    works: dict[str, Callable[[Progress], None]] = {
        "workspace": lambda shown: work.at(shown).workspace_and_more(wanted, ahead)
    }
    if "project" in wanted and work.done.dependents is not None:
        works["project"] = lambda shown: work.at(shown).hub_and_project(wanted)
    side_by_side(progress, works)
    if work.done.failed:
        lines = "\n".join(f"  {step.text()}" for step in work.done.failed)
        raise StageError(
            f"Not everything could be provisioned:\n{lines}\nWhat was created stays. Fix this and "
            f"run the same command again (phi3 azure provision shows every step)"
        )
    return work.done


class _Provisioning:
    """One pass over the steps. A step that fails is noted; those that need it are left out."""

    def __init__(
        self, clients: Clients, recipe: Recipe, progress: Progress, on_step: StepCallback
    ) -> None:
        self.clients = clients
        self.place = clients.place
        self.recipe = recipe
        self.progress = progress
        self.on_step = on_step
        self.tags = resource_tags(recipe.azure)
        self.done = Provisioned()
        poll = clients.poll
        self.create = partial(create, limit=poll.provision_timeout, pause=poll.interval)

    def at(self, progress: Progress) -> _Provisioning:
        """The same pass, with a display of its own for what is done in parallel."""
        other = copy(self)  # shallow: `done` is shared, so each branch sees the others' steps
        other.progress = progress
        return other

    def step(self, what: str, name: str, work: Callable[[], Outcome]) -> bool:
        """Do one step; whether what it makes exists afterwards."""
        note(self.progress, f"{what} {name}")
        try:
            step = Step(what, name, work())
        except StageError as error:
            step = Step(what, name, "failed", " ".join(str(error).split()))
        self.done.steps.append(step)
        self.on_step(step)
        return step.state != "failed"

    def is_ready(self, what: str) -> bool:
        """Whether the step about `what` went well."""
        return any(s.what == what and s.state in ("exists", "created") for s in self.done.steps)

    def check_quota(self) -> None:
        """Before anything is made: do the cluster and the endpoint fit into the quota?"""
        name = self.recipe.azure.compute.name
        if find("cluster", name, self.clients.ml.compute.get) is not None:
            return  # its cores are part of what is used already
        note(self.progress, "quota of the GPU family")
        refuse_shortage(quota_shortage(quota_needs(self.clients, self.recipe)))

    def ground(self, *, with_identity: bool) -> None:
        """The group, and what workspace and hub are made on; or the workspace that exists."""
        place = self.place
        existing = _workspace(self.clients, "workspace", place.workspace_name)
        if existing is not None:
            # Whoever created it, it is used with the storage account and so on that it has.
            adopted = dependents_of(existing, place)
            for what, resource in (("resource group", place.resource_group), *adopted.named()):
                self.step(what, resource, lambda: "exists")

            def use() -> Outcome:
                # Azure answers the region's name as "eastus" or as "East US".
                location = str(existing.location or place.location).replace(" ", "").lower()
                if location != place.location:
                    raise StageError(
                        f"it is in {location}, not in {place.location}. Fix: set "
                        f"azure.location={location}"
                    )
                # It may be the one that a killed command had only begun to make.
                self._await_workspace("workspace", place.workspace_name)
                return "exists"

            if not self.step("workspace", place.workspace_name, use):
                return
            self.done.dependents = adopted
            if with_identity:
                self.identity()
            return
        if not self.step(
            "resource group",
            place.resource_group,
            partial(ensure_group, self.clients, self.tags, self.progress),
        ):
            return

        def dependents(shown: Progress) -> None:
            step = self.at(shown).step
            self.done.dependents = ensure_dependents(self.clients, self.tags, shown, step)

        works: dict[str, Callable[[Progress], None]] = {"dependents": dependents}
        if with_identity:
            works["identity"] = lambda shown: self.at(shown).identity()
        side_by_side(self.progress, works)

    def workspace_and_more(
        self, wanted: set[str], ahead: Callable[[Progress], None] | None
    ) -> None:
        """The workspace, and on it side by side the cluster, the roles and what is done ahead."""
        from azure.ai.ml.entities import Workspace

        place, dependents = self.place, self.done.dependents
        if dependents is not None and not self.is_ready("workspace"):
            name = place.workspace_name
            body = Workspace(
                name=name,
                location=place.location,
                resource_group=place.resource_group,
                description="Created by phi3-promptflow",
                tags=self.tags,
                **dependents.as_arguments(),
            )
            self.step("workspace", name, partial(self._ensure_workspace, "workspace", name, body))
        works: dict[str, Callable[[Progress], None]] = {}
        if "cluster" in wanted:
            works["cluster"] = lambda shown: self.at(shown).cluster()
        if self.is_ready("workspace"):
            # Roles take minutes to act; the training job gives them that time.
            if "roles" in wanted:
                works["roles"] = lambda shown: self.at(shown).roles()
            if ahead is not None:
                works["ahead"] = ahead
        side_by_side(self.progress, works)

    def _ensure_workspace(self, what: str, name: str, body: Workspace) -> Outcome:
        """Workspace, hub and project are the same kind of resource to Azure."""
        if _workspace(self.clients, what, name) is not None:
            self._await_workspace(what, name)
            return "exists"
        read = partial(_workspace_resource, self.clients, name)
        # One that is being deleted keeps its name until it is gone. Not by trying: azure-ai-ml
        # updates a workspace that it still finds, dying or not.
        doing, poll = f"Waiting for the old {what} {name} to be gone", self.clients.poll
        began = time.monotonic()
        while state_of(get_or_none(read, doing)) == "deleting":
            if time.monotonic() > began + poll.delete_timeout:
                raise StageError(f"{doing}: still there; run the same command again later")
            note(self.progress, doing)
            time.sleep(paced(time.monotonic() - began, poll.interval))
        self.create(
            f"Creating the {what} {name}",
            lambda: self.clients.subscription.workspaces.begin_create(body),
            read,
            self.progress,
        )
        return "created"

    def _await_workspace(self, what: str, name: str) -> None:
        poll = self.clients.poll
        wait_until_ready(
            f"Waiting for the {what} {name}",
            partial(_workspace_resource, self.clients, name),
            self.progress,
            ends=time.monotonic() + poll.provision_timeout,
            pause=poll.interval,
        )

    def identity(self) -> None:
        """The identity that the deployment runs as."""
        group, name = self.place.resource_group, self.place.identity
        operations = self.clients.identities.user_assigned_identities
        doing = f"Creating the identity {name}"
        body: Any = {"location": self.place.location, "tags": self.tags}

        def ensure() -> Outcome:
            read = partial(operations.get, group, name)
            existing = get_or_none(read, doing)
            start = partial(operations.create_or_update, group, name, body)
            identity = existing
            if identity is None:
                identity = self.create(doing, start, read, self.progress)
            self.done.identity_id, self.done.principal_id = identity.id, identity.principal_id
            return "created" if existing is None else "exists"

        self.step("identity", name, ensure)

    def hub_and_project(self, wanted: set[str]) -> None:
        """The Foundry hub, on the workspace's own storage and vault, and a project in it."""
        from azure.ai.ml.entities import Hub, Project

        place, dependents = self.place, self.done.dependents
        arguments = dependents.as_arguments() if dependents is not None else {}
        # The same storage and vault as the workspace's: nothing that bills is made twice.
        hub = Hub(
            name=place.hub,
            location=place.location,
            resource_group=place.resource_group,
            tags=self.tags,
            **arguments,
        )
        project = Project(
            name=place.project,
            hub_id=place.workspace_id(place.hub),
            location=place.location,  # Azure refuses another one than the hub's
            resource_group=place.resource_group,
            tags=self.tags,
        )
        if self.step("hub", place.hub, partial(self._ensure_workspace, "hub", place.hub, hub)):
            ensure = partial(self._ensure_workspace, "project", place.project, project)
            made, principal = self.step("project", place.project, ensure), self.done.principal_id
            if made and "roles" in wanted and principal is not None:
                scope = place.workspace_id(place.project)
                self._assign([Grant(SECRETS_READER, scope, principal)])

    def roles(self) -> None:
        """What the identity may do, but in the project."""
        dependents, principal = self.done.dependents, self.done.principal_id
        if dependents is None or principal is None:
            return
        self._assign(
            grants(
                principal,
                dependents,
                group=self.place.group_scope,
                connections=[self.place.workspace_id()],
                least_privilege=self.recipe.azure.least_privilege,
            )
        )

    def _assign(self, wanted: list[Grant]) -> None:
        for grant in wanted:
            self.step("role", grant.label, partial(ensure_grant, self.clients, grant))

    def cluster(self) -> None:
        """The GPU cluster; it bills only while it has nodes."""
        section = self.recipe.azure.compute
        if not self.is_ready("workspace"):
            self.done.steps.append(Step("cluster", section.name, "skipped", "no workspace"))
            return
        self.step(
            "cluster",
            section.name,
            lambda: ensure_cluster(self.clients, section, self.tags, self.progress),
        )


def _workspace(clients: Clients, what: str, name: str) -> Workspace | None:
    """The workspace, hub or project; None where it does not exist or is being deleted."""
    workspace = find(what, name, clients.subscription.workspaces.get)
    if workspace is None:
        return None
    read = partial(_workspace_resource, clients, name)
    resource = get_or_none(read, f"Looking for the {what} {name}")
    gone = resource is None or state_of(resource) in ("deleting", "softdeleted")
    return None if gone else workspace


def _workspace_resource(clients: Clients, name: str) -> object:
    """As ARM has it: azure-ai-ml's Workspace drops the provisioning state."""
    arm_id = clients.place.workspace_id(name)
    return clients.resources.resources.get_by_id(arm_id, api_version=_WORKSPACE_API)


def ensure_cluster(
    clients: Clients, section: ComputeSection, tags: dict[str, str], progress: Progress
) -> Outcome:
    """Make sure of the GPU cluster; StageError, with what still bills, when it cannot be used."""
    from azure.ai.ml.entities import AmlCompute

    operations, name = clients.ml.compute, section.name
    existing = find("cluster", name, operations.get)
    # A failed one is put again. One that is being deleted refuses that with a 409 until it is gone,
    # which `create` waits for.
    if existing is not None and state_of(existing) not in ("failed", "deleting"):
        # An existing cluster is used or refused, never changed: others may work on it.
        own_size = str(getattr(existing, "size", "") or "")
        if own_size and own_size.lower() != section.size.lower():
            raise StageError(
                f"it has machines of size {own_size}, the recipe says {section.size}. Fix: set "
                f"azure.compute.size={own_size}, or another azure.compute.name"
            )
        most = getattr(existing, "max_instances", None)
        if most is not None and int(most) < section.max_instances:
            raise StageError(
                f"it has at most {most} machines, the recipe says {section.max_instances}. Fix: "
                f"set azure.compute.max_instances={most}, or another azure.compute.name"
            )
        return "exists"
    size = find_size(clients, section.size, "azure.compute.size")
    if size.gpus < 1:
        raise StageError(f"{size.name} has no GPU. Fix: set azure.compute.size to one that has")
    body = AmlCompute(
        name=name,
        size=section.size,
        # Low-priority machines are cheaper, and Azure may take them away in the middle of a job.
        tier="low_priority" if section.tier == "LowPriority" else "dedicated",
        min_instances=section.min_instances,
        max_instances=section.max_instances,
        idle_time_before_scale_down=section.idle_time_before_scale_down,  # seconds
        location=clients.place.location,
        tags=tags,
    )
    remains = (
        "A failed cluster stays until it is deleted, and bills if it has nodes: "
        f"az ml compute delete --name {name} --workspace-name {clients.place.workspace_name} "
        f"--resource-group {clients.place.resource_group}"
    )
    try:
        cluster = create(
            f"Creating the cluster {name}",
            lambda: operations.begin_create_or_update(body),
            lambda: operations.get(name),
            progress,
            limit=clients.poll.provision_timeout,
            pause=clients.poll.interval,
        )
    except StageError as error:
        try:
            exists = find("cluster", name, operations.get) is not None
        except StageError:  # nobody can tell, so it may bill
            exists = True
        left = remains if exists else "No cluster was created: nothing bills"
        raise StageError(f"{error}. {left}") from None
    if state_of(cluster) == "failed":
        raise StageError(f"Azure created the cluster in the state Failed. {remains}")
    return "created"


def is_provisioned(
    clients: Clients, section: AzureSection, *, parts: Iterable[str] = PARTS
) -> bool:
    """Whether what `provision` makes still exists; roles are taken to exist with their scopes."""
    place, wanted = clients.place, set(parts)
    names = [place.workspace_name]
    if "project" in wanted:
        names += [place.hub, place.project]
    if any(_workspace(clients, "workspace", name) is None for name in names):
        return False
    if wanted & {"roles", "project"}:
        read = partial(clients.identities.user_assigned_identities.get, place.resource_group)
        if find("identity", place.identity, read) is None:
            return False
    if "cluster" in wanted:
        cluster = find("cluster", section.compute.name, clients.ml.compute.get)
        return cluster is not None and state_of(cluster) not in ("failed", "deleting")
    return True
