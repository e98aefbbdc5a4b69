"""Cores that the cluster still holds when the endpoint needs them: says so, and waits for them.

A cluster keeps a node for `azure.compute.idle_time_before_scale_down` after its last job, and the
node's cores count until it is gone. Reads the region's quota and the cluster's nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ...errors import StageError
from ...progress import Progress, note
from ...recipe.azure import AzureSection
from .clients import Clients
from .failures import code_of
from .operations import find
from .sizes import Need, cores_needed, family_key, find_size, quota_usage

T = TypeVar("T")
# Seconds that Azure may take to give a node back after its idle time: it drains it and frees the
# machine, and the quota follows. Minutes as people report them; Microsoft names no figure.
RELEASE_SECONDS = 900.0


def taking_turns(needs: list[Need], section: AzureSection) -> str:
    """A line for `plan` where cluster and endpoint fit into the quota one after the other only."""
    training, endpoint = needs
    both = training.cores + endpoint.cores
    if training.limit is None or training.family != endpoint.family or both <= training.limit:
        return ""
    if section.compute.min_instances:
        return (
            f"cluster and endpoint together need {both} cores of {endpoint.family}, the quota is "
            f"{training.limit}, and azure.compute.min_instances={section.compute.min_instances} "
            "keeps nodes: the deployment may be refused. Request more (phi3 azure quota --request "
            f"{both}) or set azure.compute.min_instances=0"
        )
    idle = section.compute.idle_time_before_scale_down
    return (
        f"cluster and endpoint together need {both} cores of {endpoint.family}, the quota is "
        f"{training.limit}: `deploy` waits until the cluster's node is gone, {idle} s after the "
        "last job and the minutes that Azure takes; training again needs the endpoint's cores "
        "(phi3 down --on azure)"
    )


def when_cores_are_free(
    clients: Clients, section: AzureSection, start: Callable[[], T], progress: Progress
) -> T:
    """What `start` returns, once idling nodes have given back the cores that the endpoint needs.

    Raises what `start` raises; a refusal for lack of quota only when no node can go any more.
    StageError where the nodes are still there at the time limit.
    """
    from azure.core.exceptions import HttpResponseError

    idle = section.compute.idle_time_before_scale_down
    limit = idle + RELEASE_SECONDS
    cluster = _in_the_same_family(clients, section)
    started = time.monotonic()
    while True:
        held = cluster.look(clients) if cluster else None
        seconds = time.monotonic() - started
        if not held or held.free >= held.needed:
            try:
                return start()
            except HttpResponseError as error:
                # The figures lag behind: Azure has the last word.
                is_short = (code_of(error) or "").lower() in ("outofquota", "quotaexceeded")
                if not held or not is_short or seconds > limit:
                    raise
        elif seconds > limit:
            raise StageError(
                f"The deployment needs {held.needed} cores of {held.family}; {held.free} are free, "
                f"and the cluster {held.cluster} still holds {held.nodes} node(s) after "
                f"{limit:.0f} s. A job may be working there: phi3 status --on azure. Or request "
                f"more: phi3 azure quota --request {held.limit + held.needed - held.free}"
            )
        note(
            progress,
            f"waiting for {held.needed} cores: {held.nodes} node(s) of {held.cluster} hold them "
            f"until {idle} s after the last job, {seconds:.0f} s",
        )
        time.sleep(clients.poll.interval)


@dataclass(frozen=True)
class _Held:
    """Cores that the endpoint needs and that are free, and the nodes that may give some back."""

    cluster: str
    family: str
    needed: int
    free: int
    limit: int
    nodes: int


@dataclass(frozen=True)
class _Cluster:
    """The cluster; `needed` cores of its family are what the endpoint needs."""

    name: str
    family: str
    needed: int
    least: int  # nodes that never go

    def look(self, clients: Clients) -> _Held | None:
        """None where no node can go, or Azure does not say."""
        from azure.core.exceptions import AzureError

        try:
            nodes = len(list(clients.ml.compute.list_nodes(self.name))) - self.least
        except AzureError:
            return None
        used, limit = quota_usage(clients).get(family_key(self.family), (0, 0))
        if nodes <= 0 or not limit:
            return None
        return _Held(self.name, self.family, self.needed, max(0, limit - used), limit, nodes)


def _in_the_same_family(clients: Clients, section: AzureSection) -> _Cluster | None:
    """The cluster, where it exists and its nodes count against the endpoint's quota."""
    compute, endpoint = section.compute, section.endpoint
    if compute.tier == "LowPriority":  # a pool of its own
        return None
    cluster = find("cluster", compute.name, clients.ml.compute.get)
    if cluster is None:
        return None
    size = find_size(clients, endpoint.instance_type, "azure.endpoint.instance_type")
    own_size = str(getattr(cluster, "size", None) or compute.size)
    if find_size(clients, own_size, "azure.compute.size").family != size.family:
        return None
    needed, _rule = cores_needed(size, endpoint.instance_count, online=True)
    least = int(getattr(cluster, "min_instances", 0) or 0)
    return _Cluster(compute.name, size.family, needed, least)
