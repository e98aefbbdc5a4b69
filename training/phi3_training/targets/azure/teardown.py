"""`down` on Azure: deletes what bills, waits for each, and says what is gone and what is left.

Reads <run>/azure/made.json and Azure; strikes what is gone and drops the manifests that named it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ... import promptflow_store
from ...console import ProgressCallback
from ...errors import MissingExtraError, StageError
from ...recipe_azure import AzureSection
from ...run import Run
from .clients import Clients
from .connections import delete_connection
from .endpoints import OWNER_TAG, delete_deployment, shares
from .everything import remove_everything
from .failures import explained
from .inventory import take
from .jobs import cancel_all
from .names import endpoint_name
from .place import Made, noted, strike
from .removing import remove
from .waiting import look, state_of

log = logging.getLogger(__name__)


@dataclass
class Receipt:
    """What became of each thing."""

    ended: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    soft: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def lines(self, billing: list[str]) -> list[str]:
        """For people, in the order of what matters."""
        told = [*self.ended, *(f"deleted: {item}" for item in self.gone)]
        told = told or ["deleted: nothing was there"]
        told += [f"left alone: {item}" for item in self.kept]
        told += [f"soft-deleted: {item}" for item in self.soft]
        told += [f"FAILED: {item}" for item in self.failed]
        told += [f"still bills: {item}" for item in billing]
        if not billing:
            told.append("still bills: nothing by the hour")
        return told


def remove_run(
    clients: Clients, section: AzureSection, run: Run, only: str, progress: ProgressCallback
) -> list[str]:
    """Delete what `only` names of the run's things; the receipt.

    Raises StageError with the receipt when something could not be deleted.
    """
    receipt = Receipt()
    work = _Teardown(clients, section, run, progress, receipt)
    if only == "failed":
        work.each(work.failed, work.cluster_that_failed)
    elif only == "idle":
        work.each(work.failed, work.idle, work.cluster_that_failed)
    else:
        work.each(work.jobs, work.connections, work.endpoint, work.cluster)
    if only == "all" and not receipt.failed:
        work.each(work.everything)
    if only == "all" and not receipt.failed:
        left = []
        # Job, model and workspace are gone: the next `up` begins with the prepared chats.
        for name in ("azure.json", "model.json", "registration.json", "azure/jobs.json"):
            (run.path / name).unlink(missing_ok=True)
    else:
        left = _left(clients, run)
    told = receipt.lines(left)
    if receipt.failed:
        raise StageError("Not everything could be deleted:\n" + "\n".join(f"  {x}" for x in told))
    return told


def _left(clients: Clients, run: Run) -> list[str]:
    """What bills now, and what a look at it could not tell."""
    found = take(clients, run)
    unknown = [f"perhaps: {what} could not be read" for what in found.unknown]
    little = "storage account, container registry and logs of the workspace, little (--all)"
    return [*found.billing(), *unknown, *([little] if found.stands else [])]


class _Teardown:
    """One pass. Each thing's failure is kept, and the rest goes on."""

    def __init__(
        self,
        clients: Clients,
        section: AzureSection,
        run: Run,
        progress: ProgressCallback,
        receipt: Receipt,
    ) -> None:
        self.clients = clients
        self.section = section
        self.run = run
        self.progress = progress
        self.receipt = receipt

    def each(self, *steps: Callable[[], None]) -> None:
        """Every step, also after one that could not: what bills must not wait for the rest."""
        for step in steps:
            try:
                step()
            except StageError as error:
                self.receipt.failed.append(" ".join(str(error).split()))

    def everything(self) -> None:
        """The workspace and all that was made for it."""
        receipt = self.receipt
        remove_everything(
            self.clients, self.section, self.progress, receipt.gone, receipt.kept, receipt.soft
        )

    def jobs(self) -> None:
        """The run's jobs that still work: they would hold the cluster, and bill on it."""
        self.receipt.ended += cancel_all(self.clients, self.run)

    def endpoint(self) -> None:
        """The run's endpoint with all its deployments; of somebody else's only our deployments."""
        named = {made.name for made in noted(self.run, "endpoint")}
        deployed_to = self._deployed_to()
        for name in sorted(self._endpoints()):
            found = self._look(name)
            if found is None:
                strike(self.run, Made("endpoint", name))
            elif name in named or (found.tags or {}).get(OWNER_TAG) == self.run.name:
                self._delete_endpoint(name)
            elif name in deployed_to:
                self._leave(name, found)
        if not self.receipt.failed:
            self._forget_local()

    def _forget_local(self) -> None:
        """The connection on this machine, if it still leads there, and the stages' manifests."""
        connection = self.run.manifest("connection")
        if connection is not None:
            try:
                leads_to, _key = promptflow_store.read_connection(connection["name"])
                if leads_to == connection["endpoint"]:
                    promptflow_store.delete_connection(connection["name"])
                    self.receipt.gone.append(f"connection {connection['name']} on this machine")
            except (promptflow_store.StoreError, MissingExtraError) as error:
                log.info("the connection on this machine stays: %s", error)
        for stage in ("answer", "connection", "endpoint"):
            (self.run.path / f"{stage}.json").unlink(missing_ok=True)

    def _endpoints(self) -> set[str]:
        """Every endpoint that the run may have made or deployed to."""
        found = {made.name for made in noted(self.run, "endpoint")}
        return (
            found
            | self._deployed_to()
            | {endpoint_name(self.section, self.clients.workplace, self.run)}
        )

    def _deployed_to(self) -> set[str]:
        return {made.parent for made in noted(self.run, "deployment")}

    def _look(self, name: str) -> Any | None:
        return look(
            lambda: self.clients.ml.online_endpoints.get(name), f"Looking for the endpoint {name}"
        )

    def _delete_endpoint(self, name: str) -> None:
        operations = self.clients.ml.online_endpoints
        done = self._try(
            f"endpoint {name} and its deployments",
            lambda: remove(
                f"Deleting the endpoint {name}",
                lambda: operations.begin_delete(name),
                lambda: operations.get(name),
                self.progress,
                limit=self.section.poll.delete_timeout,
                pause=self.section.poll.interval,
            ),
        )
        if done:
            strike(self.run, Made("endpoint", name))

    def _leave(self, name: str, endpoint: Any) -> None:
        """An endpoint that the run did not make: its own deployments there that serve nobody."""
        self.receipt.kept.append(f"endpoint {name}: phi3 did not make it")
        self._delete_idle(name, shares(endpoint.traffic))

    def _delete_idle(self, name: str, traffic: dict[str, int], *, failed: bool = False) -> None:
        operations = self.clients.ml.online_deployments
        ours = {made.name for made in noted(self.run, "deployment") if made.parent == name}
        with explained(f"Listing the deployments of {name}"):
            there = [(str(item.name), state_of(item)) for item in operations.list(name)]
        for deployment, state in there:
            if deployment not in ours or (failed and state != "failed"):
                continue
            if traffic.get(deployment):
                self.receipt.kept.append(
                    f"deployment {deployment} of {name}: it has {traffic[deployment]} % of the "
                    "traffic"
                )
                continue
            if self._try(f"deployment {deployment} of {name}", self._deleter(name, deployment)):
                strike(self.run, Made("deployment", deployment, name))

    def _deleter(self, endpoint: str, name: str) -> Any:
        return lambda: delete_deployment(self.clients, self.section, endpoint, name, self.progress)

    def idle(self) -> None:
        """The run's deployments without traffic."""
        for name in sorted(self._deployed_to()):
            found = self._look(name)
            if found is not None:
                self._delete_idle(name, shares(found.traffic))

    def failed(self) -> None:
        """The run's deployments that failed."""
        for name in sorted(self._deployed_to()):
            found = self._look(name)
            if found is not None:
                self._delete_idle(name, shares(found.traffic), failed=True)

    def cluster_that_failed(self) -> None:
        """The cluster, if it failed: it stays so until it is deleted."""
        self.cluster(failed=True)

    def cluster(self, *, failed: bool = False) -> None:
        """The cluster, where phi3 made it."""
        name, operations = self.section.compute.name, self.clients.ml.compute
        found = look(lambda: operations.get(name), f"Looking for the cluster {name}")
        if found is None or (failed and state_of(found) != "failed"):
            return
        if (found.tags or {}).get("created-by") != "phi3-promptflow":
            self.receipt.kept.append(f"cluster {name}: phi3 did not make it")
            return
        self._try(
            f"cluster {name}",
            lambda: remove(
                f"Deleting the cluster {name}",
                lambda: operations.begin_delete(name),
                lambda: operations.get(name),
                self.progress,
                limit=self.section.poll.delete_timeout,
                pause=self.section.poll.interval,
            ),
        )

    def connections(self) -> None:
        """The run's connections in workspace and project: their key opens nothing any more."""
        for made in noted(self.run, "connection"):
            work = partial(
                delete_connection, self.clients, made.parent, made.name, self._endpoints()
            )
            if self._try(f"connection {made.name} in {made.parent}", work):
                strike(self.run, made)

    def _try(self, what: str, work: Any) -> bool:
        """Do it; whether it is gone. A failure goes on the receipt."""
        try:
            was_there = work()
        except StageError as error:
            self.receipt.failed.append(f"{what}: {' '.join(str(error).split())}")
            return False
        if was_there is not False:
            self.receipt.gone.append(what)
        return True
