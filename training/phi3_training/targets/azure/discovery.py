"""What phi3 made in a subscription, by its tags, and its end: for a machine without run folders.

A workspace is found by phi3's tag or by the deadline of an endpoint in it; one that somebody else
made and that has no such endpoint must be named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import StageError, UsageError
from ...progress import Progress
from ...recipe.azure import AzureSection
from .clients import Clients
from .deadline import ENDPOINT_TAG, WORKSPACE_TAG, remove_deadline
from .failures import explained
from .inventory import take_inventory
from .jobs import WORKING, compute_of, status_of
from .place import (
    CREATED_BY,
    CREATED_BY_TAG,
    JOB_RUN_TAG,
    RUN_TAG,
    Place,
    find_place,
    made_by_phi3,
)
from .resources import last_part
from .search_service import made_services, remove_service
from .teardown import Deletion
from .workflow import WORKFLOW_TYPE

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
