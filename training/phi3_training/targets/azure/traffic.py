"""Which deployment of an endpoint gets how many percent of the requests: read, checked, changed.

A change is one PUT of the whole endpoint as it was just read, and counts only once the shares have
been read back. Reads and writes Azure alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import StageError
from ...progress import Progress, note
from ...recipe.azure import AzureSection
from .clients import Clients
from .failures import explained, message_of, stage_error
from .operations import CONFLICTS, TRIES, Poller, is_transient, state_of, wait_for, without_dots

if TYPE_CHECKING:
    from azure.ai.ml.entities import OnlineEndpoint

log = logging.getLogger(__name__)
_CHANGING, _FAILED = ("creating", "updating", "deleting"), ("failed", "canceled")
# The SDK's update is a PUT of the whole endpoint: each tag that is not sent is lost.
Tags = Mapping[str, str | None]  # None: the tag is taken away


@dataclass(frozen=True)
class DeploymentId:
    """A deployment's name and that of its endpoint."""

    endpoint: str
    name: str


@dataclass(frozen=True)
class Wanted:
    """What an endpoint is to have: shares in percent, copies of requests, tags that change."""

    shares: Mapping[str, int]
    mirror: Mapping[str, int] | None = None  # None: as it is, where that is still possible
    unmirrored: str = ""  # a deployment that gets no copies any more
    tags: Tags | None = None

    def holds_for(self, endpoint: OnlineEndpoint) -> bool:
        """Whether the endpoint has all of it."""
        has = dict(endpoint.tags or {})
        return (
            state_of(endpoint) not in _FAILED  # then nobody knows what its front door does
            and traffic_shares(endpoint.traffic) == traffic_shares(self.shares)
            and traffic_shares(endpoint.mirror_traffic) == self.mirror_beside(endpoint)
            and all(has.get(name) == value for name, value in (self.tags or {}).items())
        )

    def mirror_beside(self, endpoint: OnlineEndpoint) -> dict[str, int]:
        """Who is to get copies: a deployment has a share of the traffic or copies, never both."""
        mirror = traffic_shares(endpoint.mirror_traffic if self.mirror is None else self.mirror)
        live = {*traffic_shares(self.shares), self.unmirrored}
        return {name: percent for name, percent in mirror.items() if name not in live}


def set_traffic(
    clients: Clients,
    section: AzureSection,
    endpoint_name: str,
    wanted: Wanted,
    progress: Progress,
) -> bool:
    """Give each deployment its share in percent; False where they have it already.

    Raises StageError for shares that Azure would refuse, before anything is sent; and, with Azure's
    own reason and the shares that count now, when Azure refuses them.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    operations = clients.ml.online_endpoints
    doing = f"Giving the traffic of {endpoint_name} to {shares_text(wanted.shares)}"
    pause, ends = section.poll.interval, time.monotonic() + section.poll.deploy_timeout
    tries, conflicts, changed = TRIES, CONFLICTS, False
    refusal: StageError | None = None
    while True:
        with explained(f"Reading the endpoint {endpoint_name}"):
            endpoint = operations.get(endpoint_name)
            deployments = [
                str(item.name) for item in clients.ml.online_deployments.list(endpoint_name)
            ]
        check_traffic(wanted.shares, deployments)
        is_changing = state_of(endpoint) in _CHANGING
        if not is_changing and wanted.holds_for(endpoint):
            return changed  # also after an answer that was lost on the way
        if time.monotonic() > ends or not tries or not conflicts:
            # Azure's reason, and who has the traffic now.
            text = str(refusal or f"{doing}: Azure reported success, but did not do it")
            raise StageError(f"{text}\nThe shares are still: {shares_text(endpoint.traffic)}.")
        if is_changing:
            note(progress, f"{doing}: the endpoint is being changed ({state_of(endpoint)})")
            time.sleep(pause)
            continue
        endpoint.mirror_traffic = wanted.mirror_beside(endpoint)
        endpoint.traffic = {name: wanted.shares.get(name, 0) for name in deployments}
        tags = {**(endpoint.tags or {}), **(wanted.tags or {})}
        endpoint.tags = {name: value for name, value in tags.items() if value is not None}
        changed = True
        try:
            with without_dots():
                operation = operations.begin_create_or_update(endpoint)
                if isinstance(operation, Poller):
                    wait_for(operation, doing, progress, max(1.0, ends - time.monotonic()))
        except (AzureError, MlException) as fault:
            refusal = stage_error(fault, doing)
            if getattr(fault, "status_code", None) == 409:
                conflicts -= 1
            else:
                # A poll that answers 404: the operation's record is lost, not the change.
                lasts = not is_transient(fault) and getattr(fault, "status_code", None) != 404
                tries = 0 if lasts else tries - 1
            if tries and conflicts:
                note(progress, f"{doing}: refused, trying again ({message_of(fault)[:120]})")
                time.sleep(pause)
        else:
            # Azure says that it is done; only what is read back counts.
            tries -= 1


def traffic_shares(traffic: Mapping[str, int] | None) -> dict[str, int]:
    """The deployments that get any traffic, and how many percent."""
    return {str(name): int(share) for name, share in (traffic or {}).items() if share}


def shares_text(traffic: Mapping[str, int] | None) -> str:
    """For people: `blue 95 %, green 5 %`."""
    shares = traffic_shares(traffic)
    return ", ".join(f"{name} {share} %" for name, share in shares.items()) or "nobody"


def check_traffic(wanted: Mapping[str, int], deployments: list[str]) -> None:
    """Refuse shares of deployments that do not exist, and sums other than 0 and 100."""
    shares = traffic_shares(wanted)
    missing = [name for name in shares if name not in deployments]
    if missing:
        raise StageError(
            f"There is no deployment {', '.join(missing)} to send traffic to; deployments: "
            f"{', '.join(deployments) or 'none'}"
        )
    total = sum(shares.values())
    if total not in (0, 100) or any(share < 0 for share in shares.values()):
        raise StageError(f"The shares of traffic must add up to 100, not {total}")
