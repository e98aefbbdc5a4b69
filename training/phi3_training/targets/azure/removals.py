"""Which deployments without traffic are to be deleted by themselves, and when.

Azure refuses to delete a deployment that has traffic, so a time that is out of date takes nobody's
answers away. Reads Azure and the recipe; the workflow of deadline.py does the rest.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ...recipe.azure import NO_DEADLINE, AzureSection, EndpointSection, duration_of
from .operations import state_of
from .place import RUN_TAG

# What else may pass before a new deployment has all of the traffic: questions, changes of traffic.
_BESIDE = dt.timedelta(hours=1)


class Tagged(Protocol):
    """What is used of the SDK's deployment."""

    name: str | None
    tags: dict[str, str] | None


@dataclass(frozen=True)
class Now:
    """An endpoint's deployments as they are; `used`: those that have traffic or get copies of it.

    `coming` is about to be created; `refused` failed, or was worse than the one that it was to
    replace.
    """

    deployments: Iterable[Tagged]
    used: frozenset[str]
    coming: str = ""
    refused: str = ""


def removals_of(
    section: AzureSection, run: str, found: Now, known: Mapping[str, dt.datetime], now: dt.datetime
) -> dict[str, dt.datetime]:
    """When each of the run's deployments without traffic goes; `known`: the times until now.

    One that waits for a rollback gets a new time with each change, one that failed keeps it.
    """
    settings = section.endpoint
    failed_after = length(settings.remove_failed_after)
    unused_after = length(settings.remove_unused_after)
    times: dict[str, dt.datetime] = {}
    for item in found.deployments:
        name = str(item.name)
        if name in found.used or name == found.coming:
            continue
        if (item.tags or {}).get(RUN_TAG) != run:
            if name in known:  # another run's, which set its time
                times[name] = known[name]
        elif name == found.refused or state_of(item) in ("failed", "canceled"):
            if failed_after is not None:
                at = now + failed_after
                times[name] = at if name == found.refused else min(at, known.get(name, at))
        elif unused_after is not None:
            at = now + unused_after
            times[name] = max(at, known.get(name, at))
    if found.coming and found.coming not in found.used and failed_after is not None:
        # Before it exists, so that it also goes where nobody is left to see it fail.
        times[found.coming] = now + longest_rollout(section) + failed_after
    return times


def longest_rollout(section: AzureSection) -> dt.timedelta:
    """How long a new deployment may take until it has all of the traffic."""
    looks = len(section.rollout.steps) + bool(section.rollout.mirror)
    seconds = section.poll.deploy_timeout + 60 * section.rollout.minutes * looks
    return dt.timedelta(seconds=int(seconds)) + _BESIDE


def length(after: str) -> dt.timedelta | None:
    """The recipe's duration; None for `none`."""
    return None if after == NO_DEADLINE else duration_of(after)


def rule_text(settings: EndpointSection, hourly: float | None) -> str:
    """What the recipe says of it, for people; empty where nothing is removed.

    `hourly`: what a deployment costs per hour in US dollars, where that is known.
    """
    parts = []
    for what, after, key in (
        ("one that fails or is worse", settings.remove_failed_after, "remove_failed_after"),
        ("an old one", settings.remove_unused_after, "remove_unused_after"),
    ):
        time, deadline = length(after), length(settings.deadline)
        if time is not None:
            later = deadline is not None and time > deadline
            hours = (deadline if later and deadline else time).total_seconds() / 3600
            usd = "" if hourly is None else f", {hourly * hours:.2f} USD"
            when = f"after {after}{' or at the deadline' if later else ''}"
            parts.append(f"{what} {when}{usd} (azure.endpoint.{key})")
    if not parts:
        return ""
    return f"a deployment without traffic deletes itself: {'; '.join(parts)}"
