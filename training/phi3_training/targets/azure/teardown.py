"""`down` on Azure: deletes what bills, waits for each, and says what is gone and what is left.

Reads <run>/azure/made.json and Azure; takes what is gone off the list and deletes the manifests
that named it. With "all" also the workspace and everything that phi3 made for it, by its tag
created-by; what carries no such tag is left alone and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ...errors import MissingExtraError, StageError, UsageError
from ...flow import store
from ...manifests import (
    AnswerManifest,
    ConnectionManifest,
    EndpointManifest,
    ModelManifest,
    ProvisionManifest,
    RegistrationManifest,
    RolloutManifest,
)
from ...progress import Progress
from ...recipe.azure import AzureSection
from ...run import Run
from .clients import Clients
from .deadline import ENDPOINT_TAG, WORKSPACE_TAG, remove_deadline
from .deploy import delete_deployment
from .failures import explained
from .jobs import WORKING, cancel_all, compute_of, others_at_work, status_of
from .operations import delete, find, get_or_none, state_of
from .place import (
    CREATED_BY,
    CREATED_BY_TAG,
    JOB_RUN_TAG,
    RUN_TAG,
    Place,
    RunResource,
    endpoint_name,
    find_place,
    forget,
    made_by_phi3,
    recorded_resources,
)
from .prompt_flow import delete_connection
from .resources import DELETION_ORDER, IDENTITY, SOFT_DELETED, dependents_of, grants, last_part
from .search_service import made_services, remove_service
from .status import take_inventory
from .traffic import DeploymentId, traffic_shares
from .workflow import WORKFLOW_TYPE

log = logging.getLogger(__name__)


class _Tagged(Protocol):
    @property
    def tags(self) -> dict[str, str] | None: ...


@dataclass
class Receipt:
    """What became of each resource, in lines for people."""

    cancelled: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    soft_deleted: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def lines(self, billing: list[str]) -> list[str]:
        """For people, in the order of what matters."""
        lines = [*self.cancelled, *(f"deleted: {item}" for item in self.deleted)]
        lines = lines or ["deleted: nothing (nothing existed)"]
        lines += [f"left alone: {item}" for item in self.left_alone]
        lines += [f"soft-deleted: {item}" for item in self.soft_deleted]
        lines += [f"FAILED: {item}" for item in self.failed]
        lines += [f"still bills: {item}" for item in billing]
        if not billing:
            lines.append("still bills: nothing by the hour")
        return lines


def remove_run(
    clients: Clients, section: AzureSection, run: Run, only: str, progress: Progress
) -> list[str]:
    """Delete what `only` names of the run's resources; the receipt.

    `only`: "run" (endpoint, cluster, connections, jobs), "failed" (deployments and cluster in that
    state), "idle" (also deployments without traffic) or "all" (also the workspace).
    Raises StageError with the receipt when something could not be deleted.
    """
    work = _Teardown(clients, section, run, progress)
    receipt = work.receipt
    failed_deployments = partial(work.idle_deployments, only_failed=True)
    # A failed cluster stays so until it is deleted.
    failed_cluster = partial(work.cluster, only_failed=True)
    if only == "failed":
        work.each(failed_deployments, failed_cluster)
    elif only == "idle":
        work.each(failed_deployments, work.idle_deployments, failed_cluster)
    else:
        # Jobs hold the cluster, so they end first. Connections go while the list of what the run
        # has made still names the endpoints that they must point to.
        cluster = partial(work.cluster, though_used=only == "all")
        work.each(work.jobs, work.connections, work.endpoints, cluster)
    # Not after a failure: the workspace is where the rest could still be looked at and deleted.
    if only == "all" and not receipt.failed:
        work.each(work.everything)
    billing: list[str] = []
    if only == "all" and not receipt.failed:
        # Job, model and workspace are gone: the next `up` begins with the prepared chats.
        for kind in (ProvisionManifest, ModelManifest, RegistrationManifest):
            run.forget(kind)
        (run.path / "azure" / "jobs.json").unlink(missing_ok=True)
    else:
        inventory = take_inventory(clients)
        billing = [bill.text for bill in inventory.bills()]
        billing += [f"unknown: {what} could not be read" for what in inventory.unknown]
        if inventory.group_exists:
            billing.append(
                "storage account, container registry and logs of the workspace, small charges "
                "(--all)"
            )
    return work.receipt_or_fault(billing)


def names_of_everything(clients: Clients) -> list[str]:
    """What `remove_run` with "all" looks at, besides the run's own resources."""
    place = clients.place
    return [
        f"project {place.project}",
        f"hub {place.hub}",
        f"workspace {place.workspace_name}",
        *(f"{kind.what} {kind.name(place)}" for kind in DELETION_ORDER),
        f"resource group {place.resource_group}, if nothing else is in it",
    ]


class Deletion:
    """One pass. Each failure is listed on the receipt, and the rest is still deleted."""

    def __init__(self, clients: Clients, section: AzureSection, progress: Progress) -> None:
        self.clients = clients
        self.section = section
        self.progress = progress
        self.receipt = Receipt()

    def each(self, *steps: Callable[[], None]) -> None:
        """Every step, also after one that failed: what bills must not wait for the rest."""
        for step in steps:
            try:
                step()
            except StageError as error:
                self.receipt.failed.append(" ".join(str(error).split()))

    def receipt_or_fault(self, billing: list[str]) -> list[str]:
        """The receipt, with what still bills. StageError where something could not be deleted."""
        lines = self.receipt.lines(billing)
        if self.receipt.failed:
            failed = "\n".join(f"  {line}" for line in lines)
            raise StageError(f"Not everything could be deleted:\n{failed}")
        return lines

    def remove(self, what: str, start: Callable[[], object], read: Callable[[], object]) -> bool:
        """Delete and wait until `read` finds nothing; False where nothing existed. StageError."""
        poll = self.section.poll
        return delete(
            f"Deleting the {what}",
            start,
            read,
            self.progress,
            limit=poll.delete_timeout,
            pause=poll.interval,
        )

    def attempt(self, what: str, work: Callable[[], bool]) -> bool:
        """Whether `what` is gone now; a failure is listed on the receipt."""
        try:
            existed = work()
        except StageError as error:
            self.receipt.failed.append(f"{what}: {' '.join(str(error).split())}")
            return False
        if existed:
            self.receipt.deleted.append(what)
        return True

    def keeps(self, what: str, resource: _Tagged) -> bool:
        """Whether it is not phi3's; then it is listed on the receipt as left alone."""
        if made_by_phi3(resource.tags):
            return False
        self.receipt.left_alone.append(f"{what}: phi3 did not create it")
        return True

    def everything(self) -> None:
        """The workspace and all that was made for it. StageError at the first refusal."""
        place, receipt = self.clients.place, self.receipt
        workspaces = self.clients.subscription.workspaces
        # The identity's role assignments first: they would outlive it as entries without a name.
        identities = self.clients.identities.user_assigned_identities
        read_identity = partial(identities.get, place.resource_group)
        identity = find(IDENTITY.what, place.identity, read_identity)
        if identity is not None:
            operations = self.clients.authorization.role_assignments
            existing = find("workspace", place.workspace_name, workspaces.get)
            for grant in grants(
                str(identity.principal_id),
                dependents_of(existing, place),
                group=place.group_scope,
                connections=[place.workspace_id(), place.workspace_id(place.project)],
                least_privilege=self.section.least_privilege,
            ):
                take = partial(operations.delete, grant.scope, grant.name)
                doing = f"Removing the role {grant.label} from the identity"
                if get_or_none(take, doing) is not None:  # None also where the scope is gone
                    receipt.deleted.append(f"role {grant.label}")
        # A hub that has projects cannot be deleted, so the project goes first.
        for kind_name, name in (
            ("project", place.project),
            ("hub", place.hub),
            ("workspace", place.workspace_name),
        ):
            what = f"{kind_name} {name}"
            workspace = find(kind_name, name, workspaces.get)
            if workspace is not None and not self.keeps(what, workspace):
                # Permanently: a soft-deleted workspace keeps its name, and could not be brought
                # back anyway without the storage account and the vault, which go next.
                start = partial(
                    workspaces.begin_delete,
                    name,
                    delete_dependent_resources=False,
                    permanently_delete=True,
                )
                self.remove(what, start, partial(workspaces.get, name))
                receipt.deleted.append(what)
        resources = self.clients.resources.resources
        for kind in DELETION_ORDER:
            name, arm_id = kind.name(place), kind.id(place)
            what = f"{kind.what} {name}"
            read = partial(resources.get_by_id, arm_id, api_version=kind.api_version)
            resource = get_or_none(read, f"Looking for the {what}")
            if resource is None or self.keeps(what, resource):
                continue
            start = partial(resources.begin_delete_by_id, arm_id, api_version=kind.api_version)
            if self.remove(what, start, read):
                receipt.deleted.append(what)
                if kind.what in SOFT_DELETED:
                    receipt.soft_deleted.append(
                        f"{what}: {SOFT_DELETED[kind.what].format(name=name)}"
                    )
        self._group()

    def _group(self) -> None:
        """The group, where phi3 made it and nothing is left in it."""
        name = self.clients.place.resource_group
        what = f"resource group {name}"
        groups = self.clients.resources.resource_groups
        group = find("resource group", name, groups.get)
        if group is None or self.keeps(what, group):
            return
        with explained(f"Listing what is in the {what}"):
            listed = self.clients.resources.resources.list_by_resource_group(name)
            names = [str(item.name) for item in listed]
        # Deleting a group deletes all that is in it, somebody else's resources included.
        if names:
            self.receipt.left_alone.append(
                f"{what}: it still contains {', '.join(names[:5])}; az group delete --name {name} "
                f"deletes all"
            )
        elif self.remove(what, partial(groups.begin_delete, name), partial(groups.get, name)):
            self.receipt.deleted.append(what)


class _Teardown(Deletion):
    """What one run made."""

    def __init__(
        self, clients: Clients, section: AzureSection, run: Run, progress: Progress
    ) -> None:
        super().__init__(clients, section, progress)
        self.run = run

    def jobs(self) -> None:
        """The run's jobs that still work: they would hold the cluster, and bill on it."""
        self.receipt.cancelled += cancel_all(self.clients, self.run)

    def connections(self) -> None:
        """The run's connections in workspace and project: their key opens nothing any more."""
        for resource in recorded_resources(self.run, "connection"):
            work = partial(
                delete_connection,
                self.clients,
                resource.parent,
                resource.name,
                self._endpoint_names(),
            )
            if self.attempt(f"connection {resource.name} in {resource.parent}", work):
                forget(self.run, resource)

    def _endpoint_names(self) -> set[str]:
        """Every endpoint that the run may have made or deployed to."""
        # The derived name as well, should made.json be lost; the endpoint's tag then says whose.
        created = {resource.name for resource in recorded_resources(self.run, "endpoint")}
        derived = endpoint_name(self.section, self.clients.place, self.run)
        return created | self._deployed_to() | {derived}

    def _deployed_to(self) -> set[str]:
        return {resource.parent for resource in recorded_resources(self.run, "deployment")}

    def endpoints(self) -> None:
        """The run's endpoint with all its deployments; of somebody else's only our deployments.

        Where all of that is gone, so is the connection on this machine, and the manifests of the
        stages that have to be done again.
        """
        created = {resource.name for resource in recorded_resources(self.run, "endpoint")}
        deployed_to = self._deployed_to()
        operations = self.clients.ml.online_endpoints
        for name in sorted(self._endpoint_names()):
            endpoint = find("endpoint", name, operations.get)
            if endpoint is None:  # by the deadline, in the studio, or never created
                self._deadline(name)
                forget(self.run, RunResource("endpoint", name))
            elif name in created or (endpoint.tags or {}).get(RUN_TAG) == self.run.name:
                work = partial(
                    self.remove,
                    f"endpoint {name}",
                    partial(operations.begin_delete, name),
                    partial(operations.get, name),
                )
                if self.attempt(f"endpoint {name} and its deployments", work):
                    self._deadline(name)  # not before: until then it still holds
                    forget(self.run, RunResource("endpoint", name))
            elif name in deployed_to:
                self.receipt.left_alone.append(f"endpoint {name}: phi3 did not create it")
                self._delete_deployments(name, traffic_shares(endpoint.traffic))
        if self.receipt.failed:
            return
        connection = self.run.read(ConnectionManifest)
        if connection is not None:  # the one on this machine, if it still leads there
            try:
                for name in store.delete_connections_to(connection):
                    self.receipt.deleted.append(f"connection {name} on this machine")
            except (store.StoreError, MissingExtraError) as error:
                log.info("the connection on this machine was not deleted: %s", error)
        for kind in (AnswerManifest, ConnectionManifest, EndpointManifest, RolloutManifest):
            self.run.forget(kind)

    def _deadline(self, endpoint: str) -> None:
        work = partial(remove_deadline, self.clients, endpoint, self.progress)
        self.attempt(f"deadline of {endpoint}", work)

    def idle_deployments(self, *, only_failed: bool = False) -> None:
        """The run's deployments without traffic."""
        for name in sorted(self._deployed_to()):
            endpoint = find("endpoint", name, self.clients.ml.online_endpoints.get)
            if endpoint is not None:
                shares = traffic_shares(endpoint.traffic)
                self._delete_deployments(name, shares, only_failed=only_failed)

    def _delete_deployments(
        self, endpoint: str, shares: dict[str, int], *, only_failed: bool = False
    ) -> None:
        """The run's deployments of an endpoint; Azure refuses to delete one that has traffic."""
        ours = {
            resource.name
            for resource in recorded_resources(self.run, "deployment")
            if resource.parent == endpoint
        }
        with explained(f"Listing the deployments of {endpoint}"):
            listed = self.clients.ml.online_deployments.list(endpoint)
            states = {str(item.name): state_of(item) for item in listed}
        for name, state in states.items():
            if name not in ours or (only_failed and state != "failed"):
                continue
            what = f"deployment {name} of {endpoint}"
            if shares.get(name):
                self.receipt.left_alone.append(
                    f"{what}: it has {shares[name]} % of the traffic; give that to another one "
                    f"first: phi3 azure traffic --run {self.run.name}"
                )
                continue
            target = DeploymentId(endpoint, name)
            work = partial(delete_deployment, self.clients, self.section, target, self.progress)
            if self.attempt(what, work):
                forget(self.run, RunResource("deployment", name, endpoint))

    def cluster(self, *, only_failed: bool = False, though_used: bool = False) -> None:
        """The cluster, where phi3 made it and no other run's job works on it."""
        name, operations = self.section.compute.name, self.clients.ml.compute
        what = f"cluster {name}"
        cluster = find("cluster", name, operations.get)
        if cluster is None or (only_failed and state_of(cluster) != "failed"):
            return
        if not self.keeps(what, cluster):
            users = (
                [] if only_failed or though_used else others_at_work(self.clients, self.run, name)
            )
            if users:
                self.receipt.left_alone.append(
                    f"{what}: {', '.join(users[:5])} of another run still works on it; --all "
                    f"deletes it all the same"
                )
                return
            start, read = partial(operations.begin_delete, name), partial(operations.get, name)
            self.attempt(what, partial(self.remove, what, start, read))


# --- what phi3 made, found by its tags: for a machine without run folders ---
# A workspace is found by phi3's tag or by the deadline of an endpoint in it; one that somebody else
# made and that has no such endpoint must be named.

_WORKSPACE_TYPE = "Microsoft.MachineLearningServices/workspaces"


def find_places(clients: Clients) -> list[Place]:
    """The workspaces of the subscription in which phi3 made something. StageError if refused."""
    found: dict[tuple[str, str], str] = {}
    for item in _tagged(clients):
        tags, kind = item.tags or {}, str(item.type).lower()
        if kind == _WORKSPACE_TYPE.lower():
            # A hub or project has no endpoints of its own; they go with their workspace (--all).
            if str(getattr(item, "kind", None) or "default").lower() == "default":
                found[_group_of(item), str(item.name)] = str(item.location)
        elif kind == WORKFLOW_TYPE.lower() and tags.get(WORKSPACE_TAG):
            found.setdefault((_group_of(item), tags[WORKSPACE_TAG]), str(item.location))
    return [
        place_at(clients.place, resource_group=group, workspace_name=name, location=region)
        for (group, name), region in found.items()
    ]


def place_at(near: Place, **words: str) -> Place:
    """The place in the same subscription that `words` name."""
    content = {"subscription_id": near.subscription_id, "tenant_id": near.tenant_id, **words}
    return find_place(AzureSection.model_validate(content), {}, Path("/"))


def _tagged(clients: Clients) -> list[Any]:
    wanted = f"tagName eq '{CREATED_BY_TAG}' and tagValue eq '{CREATED_BY}'"
    with explained(f"Looking for what phi3 made in {clients.place.subscription_id}"):
        return list(clients.resources.resources.list(filter=wanted))


def _group_of(item: Any) -> str:
    parts = str(item.id).split("/")
    return parts[[part.lower() for part in parts].index("resourcegroups") + 1]


class Found:
    """A workspace, and what phi3 made there that bills, works or deletes."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        place, ml = clients.place, clients.ml
        self.label = f"workspace {place.workspace_name} (resource group {place.resource_group})"
        with explained(f"Looking at the {self.label}"):
            endpoints = [
                item for item in ml.online_endpoints.list() if RUN_TAG in (item.tags or {})
            ]
            clusters = [item for item in ml.compute.list() if made_by_phi3(item.tags)]
            self.working = [job for job in ml.jobs.list() if status_of(job) in WORKING]
        self.searches = made_services(clients, group=place.resource_group)
        self.endpoints = [str(item.name) for item in endpoints]
        self.clusters = [str(item.name) for item in clusters]
        self.jobs = [str(job.name) for job in self.working if JOB_RUN_TAG in (job.tags or {})]
        # The endpoint of each workflow, also one that is gone.
        self.deadlines = {
            str(item.tags[ENDPOINT_TAG])
            for item in _tagged(clients)
            if str(item.type).lower() == WORKFLOW_TYPE.lower()
            and _group_of(item).lower() == place.resource_group.lower()
            and item.tags.get(WORKSPACE_TAG) == place.workspace_name
            and ENDPOINT_TAG in item.tags
        }

    def names(self) -> list[str]:
        """What `delete` would delete, for the question before it."""
        return [
            *(f"job {name} (cancelled)" for name in self.jobs),
            *(f"endpoint {name} and its deployments" for name in self.endpoints),
            *(f"deadline of {name}" for name in sorted(self.deadlines)),
            *(f"cluster {name}" for name in self.clusters),
            *(f"search service {last_part(each.id)} with its indexes" for each in self.searches),
        ]

    def delete(self, progress: Progress, *, everything: bool) -> list[str]:
        """Delete it and wait; with `everything` also the workspace and what was made for it.

        The receipt. Raises StageError with it where something could not be deleted.
        """
        work = _Sweep(self, progress)
        work.each(work.cancel, work.delete_endpoints, work.delete_clusters, work.delete_searches)
        if everything and not work.receipt.failed:
            work.each(work.everything)
        # Looked for again, not concluded: what still bills is the point of the receipt.
        inventory = take_inventory(self.clients)
        billing = [bill.text for bill in inventory.bills()]
        return work.receipt_or_fault(billing + [f"unknown: {what}" for what in inventory.unknown])


class _Sweep(Deletion):
    """The deletion of what was found."""

    def __init__(self, found: Found, progress: Progress) -> None:
        super().__init__(found.clients, AzureSection(poll=found.clients.poll), progress)
        self.found = found

    def cancel(self) -> None:
        """The jobs: they would hold their cluster, and bill on it."""
        for name in self.found.jobs:
            with explained(f"Cancelling the job {name}"):
                # Seconds; enough to hear that Azure has accepted.
                self.clients.ml.jobs.begin_cancel(name).wait(60)
            self.receipt.cancelled.append(f"cancelled the job {name}")

    def delete_endpoints(self) -> None:
        """The endpoints, and the deadline of each that is gone."""
        operations, kept = self.clients.ml.online_endpoints, set()
        for name in self.found.endpoints:
            what = f"endpoint {name}"
            work = self._work(what, operations, name)
            if not self.attempt(f"{what} and its deployments", work):
                kept.add(name)
        for name in sorted(self.found.deadlines):
            if name not in kept:  # else it still holds
                work = partial(remove_deadline, self.clients, name, self.progress)
                self.attempt(f"deadline of {name}", work)

    def delete_clusters(self) -> None:
        """The clusters on which nobody else works."""
        for name in self.found.clusters:
            users = [
                str(job.name)
                for job in self.found.working
                if str(job.name) not in self.found.jobs
                and compute_of(job).rsplit("/", 1)[-1].lower() == name.lower()
            ]
            if users:
                text = f"cluster {name}: {', '.join(users[:5])} of somebody else works on it"
                self.receipt.left_alone.append(text)
                continue
            what = f"cluster {name}"
            self.attempt(what, self._work(what, self.clients.ml.compute, name))

    def delete_searches(self) -> None:
        """The search services; one with somebody else's indexes is left alone."""
        for each in self.found.searches:
            try:
                line = remove_service(self.clients, each.id, self.progress, ours=None)
            except UsageError as error:
                self.receipt.left_alone.append(str(error))
            except StageError as error:
                self.receipt.failed.append(" ".join(str(error).split()))
            else:
                self.receipt.deleted.append(f"search service {last_part(each.id)} ({line})")

    def _work(self, what: str, operations: Any, name: str) -> Callable[[], bool]:
        start, read = partial(operations.begin_delete, name), partial(operations.get, name)
        return partial(self.remove, what, start, read)
