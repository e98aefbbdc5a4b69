"""A new deployment takes over the traffic in steps; what is worse than before is undone at once.

The shares from before are in <run>/rollout.json before the first change, and in a tag of the
endpoint until the last share is judged: whoever finds the endpoint half changed can finish or undo
it, and Azure itself does where nobody comes (PutBackKeeper). Each share is judged by what
probes.py measures.
"""

from __future__ import annotations

import datetime as dt
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from ... import console
from ...errors import StageError
from ...manifests import RegistrationManifest, RolloutManifest
from ...progress import Progress, note
from ...recipe import Recipe
from ...recipe.azure import NO_DEADLINE, AzureSection
from ...run import Run
from ..base import Access, PlanLine
from .clients import ARM, Clients
from .deadline import ENDPOINTS_API, PutBack, endpoint_id, keep_put_back
from .failures import explained
from .operations import find
from .place import ROLLOUT_TAG, RUN_TAG, deployment_name, endpoint_name
from .probes import FEWEST_REQUESTS, Panel, counted, golden_questions
from .resources import Body
from .sizes import cores_needed, family_key, find_size, quota_usage
from .traffic import (
    DeploymentId,
    Wanted,
    set_traffic,
    shares_text,
    traffic_shares,
)
from .workflow import shown, utc_now

if TYPE_CHECKING:
    from azure.ai.ml.entities import OnlineEndpoint

log = logging.getLogger(__name__)
_TAGGED = re.compile(r"to (\S+) from (\S+) since (\S+)")
_LONGEST_TAG = 256  # characters of a tag's value in Azure Resource Manager
# Seconds between two looks at a share that is watched for longer than one look takes.
_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class Interrupted:
    """A rollout that nobody has ended: which deployment was coming, who had the traffic before."""

    deployment: str
    before: Mapping[str, int]


def interrupted(run: Run, endpoint: OnlineEndpoint) -> Interrupted | None:
    """The unfinished rollout of an endpoint, from the run folder, else from the endpoint's tag."""
    record = run.read(RolloutManifest)
    if record is not None and record.state == "begun":
        # Another run may have taken the endpoint over since.
        known = {*record.before, record.deployment}
        if record.endpoint_name == str(endpoint.name) and known >= set(
            traffic_shares(endpoint.traffic)
        ):
            return Interrupted(record.deployment, dict(record.before))
    return tagged((endpoint.tags or {}).get(ROLLOUT_TAG))


def tagged(value: str | None) -> Interrupted | None:
    """What an endpoint's tag says of an unfinished rollout."""
    match = _TAGGED.fullmatch(value or "")
    if match is None:
        return None
    pairs = re.findall(r"([A-Za-z0-9-]+)=(\d+)", match[2])
    return Interrupted(match[1], {name: int(share) for name, share in pairs})


def undo_interrupted(
    clients: Clients, section: AzureSection, run: Run, endpoint: OnlineEndpoint, progress: Progress
) -> dict[str, int]:
    """Give back the traffic that an interrupted rollout has moved; who has how many percent now."""
    name, shares = str(endpoint.name), traffic_shares(endpoint.traffic)
    found = interrupted(run, endpoint)
    if found is None:
        return shares
    # Where nobody had the traffic, or somebody deleted who had it, the traffic stays as it is: it
    # would go to nobody.
    known = found.before and found.before.keys() <= _models(clients, name).keys()
    before = dict(found.before) if known else shares
    note(progress, f"an interrupted rollout is ended: {shares_text(before)}")
    wanted = Wanted(before, unmirrored=found.deployment, tags={ROLLOUT_TAG: None})
    set_traffic(clients, section, name, wanted, progress)
    record = run.read(RolloutManifest)
    if record is not None and record.state == "begun":
        state = "undone" if known else "done"
        run.write(record.model_copy(update={"state": state, "reasons": ["interrupted"]}))
    return before


@dataclass
class Rollout:
    """One rollout of the deployment `target`; `before` had the traffic."""

    clients: Clients
    recipe: Recipe
    run: Run
    target: DeploymentId
    before: Mapping[str, int]
    access: Access
    progress: Progress
    bills: str  # what is said of the new deployment where it stays without traffic
    keeper: PutBackKeeper | None = None  # None: nobody puts the traffic back but this process
    lines: list[str] = field(default_factory=list)  # one for each step
    _look_seconds: float = field(default=0.0, init=False)  # of the last look

    def go(self) -> None:
        """Move the traffic, step by step.

        Raises StageError with what was worse, or what Azure refused; the traffic is then as before.
        """
        others = {name: share for name, share in self.before.items() if name != self.target.name}
        if self.before and not others:
            return  # it has all the traffic already
        old = max(others, key=lambda name: others[name]) if others else None
        now = self.before.get(self.target.name, 0)
        record = RolloutManifest(
            endpoint_name=self.target.endpoint,
            deployment=self.target.name,
            before=dict(self.before),
            models=_models(self.clients, self.target.endpoint),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            state="begun",
            share=0,
            reasons=[],
        )
        self.run.write(record)
        settings = self.recipe.azure.rollout
        golden = golden_questions(self.recipe, self.run, settings.questions)
        panel = Panel(self.access, self.recipe, golden)
        try:
            self._watch(panel, old, now, minutes=0.0)
            if old and settings.mirror and not now:
                self._arm(record)
                # Copies of real requests: the new deployment bears the load, and nobody gets its
                # answers. Azure tells of copies their status and latency alone ("Perform safe
                # rollout of new deployments"), so what they say is not compared.
                wanted = Wanted(
                    record.before,
                    mirror={self.target.name: settings.mirror},
                    tags={ROLLOUT_TAG: tag_of(record)},
                )
                section, name = self.recipe.azure, self.target.endpoint
                set_traffic(self.clients, section, name, wanted, self.progress)
                self.lines.append(
                    f"{settings.mirror} % of the requests were copied to {self.target.name}: it "
                    f"bore the load; the answers to copies are not compared"
                )
                self._watch(panel, old, now, minutes=settings.minutes)
            for share in [step for step in settings.steps if step > now] if old else [100]:
                record = record.model_copy(update={"share": share})
                self.run.write(record)
                if old:
                    self._arm(record)
                self._give(record, share, tag=tag_of(record) if old else None)
                # Without an old one there is nothing that a longer look could be held against.
                self._watch(panel, old, share, minutes=settings.minutes if old else 0.0)
            if old:
                # Not before the last look: with the tag goes what would undo the rollout.
                self._give(record, record.share, tag=None)
        except BaseException as error:  # also on Ctrl-C: the old shares come back first
            undone = self._undo(record, str(error))
            if isinstance(error, StageError):
                raise StageError(f"{error}\n{undone}") from None
            console.note(undone)  # Ctrl-C, or the end of the terminal
            raise
        self.run.write(record.model_copy(update={"state": "done"}))

    def _arm(self, record: RolloutManifest) -> None:
        """Have Azure put the traffic back, should this process not come to the step's end."""
        if self.keeper is None:
            return
        # A look begins before the time is over and may end after it, and the next may take longer.
        seconds = 60 * self.recipe.azure.rollout.minutes + 3 * self._look_seconds
        console.note(self.keeper.arm(record.before, tag_of(record), seconds))

    def _give(self, record: RolloutManifest, share: int, *, tag: str | None) -> None:
        shares = shares_at(record.before, self.target.name, share)
        wanted = Wanted(shares, tags={ROLLOUT_TAG: tag})
        section = self.recipe.azure
        set_traffic(self.clients, section, self.target.endpoint, wanted, self.progress)

    def _watch(self, panel: Panel, old: str | None, share: int, *, minutes: float) -> None:
        """Look at a share until its time is over; StageError as soon as it is worse than before."""

        def step(done: int, total: int) -> None:
            text = f"{self.target.name} with {share} %: golden questions"
            self.progress(done, total, text)

        ends = time.monotonic() + 60 * minutes
        looks = 0
        while True:
            began = time.monotonic()
            judged = panel.look(self.target.name, old, step)
            self._look_seconds = time.monotonic() - began
            looks += 1
            left = ends - time.monotonic()
            reasons, counts = [*judged.reasons], ""
            # What Azure Monitor counted of real requests: without a share it has none.
            if old is not None and minutes and share:
                read = partial(counted, self.clients, self.target.endpoint, minutes=minutes)
                new, before = read(self.target.name), read(old)
                counts = "; Azure Monitor has no figures yet"
                if new is not None and before is not None:
                    failed = f"{new.share:.1%} of {new.requests:.0f} requests failed"
                    text = f"Azure Monitor: {failed} ({old}: {before.share:.1%})"
                    counts = f"; {text}"
                    enough = min(new.requests, before.requests) >= FEWEST_REQUESTS
                    allowed = self.recipe.azure.rollout.max_error_gain
                    if enough and new.share - before.share > allowed:
                        reasons.append(text)
            if reasons:
                faults = "\n  ".join(reasons)
                raise StageError(
                    f"The deployment {self.target.name} of {self.target.endpoint} is worse than "
                    f"{old or 'the evaluated model'}, with {share} % of the traffic "
                    f"({judged.figures}):\n  {faults}"
                )
            if left <= 0:
                again = f", the last of {looks} looks" if looks > 1 else ""
                line = f"with {share} % of the traffic: {judged.figures}{again}{counts}"
                self.lines.append(line)
                return
            note(self.progress, f"{share} % of the traffic, {left / 60:.1f} minutes more")
            time.sleep(min(left, _PAUSE_SECONDS))

    def _undo(self, record: RolloutManifest, reason: str) -> str:
        """Put the shares from before back, and read them back; what to tell of it."""
        wanted = Wanted(record.before, unmirrored=self.target.name, tags={ROLLOUT_TAG: None})
        section, name = self.recipe.azure, self.target.endpoint
        try:
            set_traffic(self.clients, section, name, wanted, self.progress)
        except StageError as error:
            return (
                f"The traffic could not be put back to {shares_text(record.before)}: {error}\n"
                f"Put it back with: phi3 azure rollback --run {self.run.name}"
            )
        reasons = reason.splitlines()
        self.run.write(record.model_copy(update={"state": "undone", "reasons": reasons}))
        kept = "The traffic is as before" if record.share else "It got no traffic"
        return f"{kept}, read back from Azure: {shares_text(record.before)}.\n{self.bills}"


def shares_at(before: Mapping[str, int], new: str, share: int) -> dict[str, int]:
    """The shares when `new` has `share` percent and the others the rest, as it was among them."""
    others = {name: part for name, part in before.items() if name != new}
    rest, total = 100 - share, sum(others.values())
    if not rest or not total:
        return {new: share}
    exact = {name: rest * part / total for name, part in others.items()}
    found = {name: int(part) for name, part in exact.items()}
    # The percents lost to rounding go to those that lost most.
    by_loss = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in by_loss[: rest - sum(found.values())]:
        found[name] += 1
    return {**found, new: share}


def tag_of(record: RolloutManifest) -> str:
    """The tag of an endpoint whose traffic is between two states."""
    before = ",".join(f"{name}={share}" for name, share in record.before.items())
    text = f"to {record.deployment} from {before} since {record.started}"
    # With 20 deployments of 32 characters it may not fit; the run folder has it all the same.
    return text if len(text) <= _LONGEST_TAG else f"to {record.deployment} since {record.started}"


def _models(clients: Clients, endpoint: str) -> dict[str, str]:
    """What each deployment of an endpoint serves, by its id."""
    with explained(f"Listing the deployments of {endpoint}"):
        listed: Sequence[object] = list(clients.ml.online_deployments.list(endpoint))
    return {str(getattr(d, "name", "")): str(getattr(d, "model", "") or "") for d in listed}


def plan_lines(clients: Clients, recipe: Recipe, run: Run) -> list[PlanLine]:
    """What a rollout takes in time, cores and money; nothing where no deployment has traffic."""
    section, settings = recipe.azure, recipe.azure.endpoint
    name = endpoint_name(section, clients.place, run)
    endpoint = find("endpoint", name, clients.ml.online_endpoints.get)
    if endpoint is None or not traffic_shares(endpoint.traffic):
        return []
    steps, minutes = section.rollout.steps, section.rollout.minutes
    price = clients.prices.text(
        settings.instance_type, settings.instance_count, clients.place.location
    )
    after = settings.remove_unused_after
    kept = (
        "the old one until the deadline or phi3 down --on azure --idle"
        if after == NO_DEADLINE
        else f"the old one, kept for a rollback, for {after} more or until the deadline "
        "(azure.endpoint.remove_unused_after)"
    )
    return [
        PlanLine(
            "deploy",
            f"a changed model or setting gets a new deployment next to the old one "
            f"({shares_text(endpoint.traffic)}) and takes over in steps of "
            f"{', '.join(map(str, steps))} %, each watched for {minutes:g} minutes",
        ),
        _second_deployment(clients, recipe, run, name),
        PlanLine(
            "cost",
            f"rollout: both deployments bill from its creation (minutes) through "
            f"{minutes * len(steps):g} minutes of steps, and {kept}; the "
            f"second {settings.instance_count} x {settings.instance_type}: {price}",
        ),
    ]


def _second_deployment(clients: Clients, recipe: Recipe, run: Run, endpoint: str) -> PlanLine:
    """Whether the quota has room for the new deployment while the old ones stand."""
    settings = recipe.azure.endpoint
    size = find_size(clients, settings.instance_type, "azure.endpoint.instance_type")
    cores, _rule = cores_needed(size, settings.instance_count, online=True)
    with explained(f"Listing the deployments of {endpoint}"):
        listed = list(clients.ml.online_deployments.list(endpoint))
    taken = 0
    for item in listed:
        kind = str(getattr(item, "instance_type", None) or "")
        if kind.lower() == settings.instance_type.lower():
            taken += cores_needed(size, int(item.instance_count or 1), online=True)[0]
    _used, limit = quota_usage(clients).get(family_key(size.family), (0, None))
    text = (
        f"a new deployment needs {cores} cores of {size.family} besides the {taken} of those that "
        f"stand"
    )
    if limit is None:
        return PlanLine("quota", f"{text}; the limit could not be read")
    if taken + cores <= limit:
        return PlanLine("quota", f"{text}; the limit of {limit} has room")
    # It stops `up` only where a new deployment is sure to be needed.
    model = run.read(RegistrationManifest)
    names = {str(item.name) for item in listed}
    needed = model is not None and (
        deployment_name(recipe.azure, model.model, model.model_version) not in names
    )
    return PlanLine(
        "quota",
        f"{text}; the limit is {limit}, so Azure would refuse it, and the old one stays: phi3 "
        f"azure quota --request {taken + cores}, or phi3 down --on azure --idle",
        stops=needed,
    )


# --- should this client die: Azure itself puts the traffic back ---
# Before each step the endpoint's workflow (deadline.py) gets a PUT of the whole endpoint with the
# shares from before, due when the step should be over. It is sent only while the endpoint carries
# the rollout's tag, which the rollout's end takes away: what is left of it then changes nothing.
# Never verified on live Azure.

# A change of the traffic takes a minute or two, and may wait for another one; with room to spare.
_CHANGE = dt.timedelta(minutes=20)
# Azure sets these by itself, and takes none of them.
_READ_ONLY = {"id", "name", "type", "systemData"}
_READ_ONLY_PROPERTIES = {"provisioningState", "scoringUri", "swaggerUri"}


@dataclass
class PutBackKeeper:
    """Keeps one endpoint's put-back up to date while `target` takes over."""

    clients: Clients
    section: AzureSection
    run: Run
    endpoint: str
    target: str
    progress: Progress
    _body: Body = field(default_factory=dict, init=False)

    def arm(self, before: Mapping[str, int], tag: str, seconds: float) -> str:
        """Have the shares `before` put back unless the step ends within `seconds`, and some more.

        One sentence about it. Nothing is raised: the rollout itself puts them back while it lives.
        """
        from azure.core.rest import HttpRequest

        try:
            with explained(f"Reading the endpoint {self.endpoint}"):
                found = self._body
                if not found:
                    # As Azure sends it: the SDK's own class leaves out what it does not know, and
                    # a PUT without that would remove it.
                    url = f"{ARM}{endpoint_id(self.clients.place, self.endpoint)}"
                    request = HttpRequest("GET", url, params={"api-version": ENDPOINTS_API})
                    answer = self.clients.arm().send_request(request)
                    answer.raise_for_status()
                    found = answer.json()
            if RUN_TAG not in (found.get("tags") or {}):
                return self._not("phi3 did not create the endpoint")
            self._body = self._body or put_back_body(found, before, self.target)
            at = utc_now() + dt.timedelta(seconds=int(seconds)) + _CHANGE
            back = PutBack(at, (ROLLOUT_TAG, tag), self._body)
            keep_put_back(self.clients, self.section, self.run, self.endpoint, back, self.progress)
        except StageError as error:
            return self._not(" ".join(str(error).split()).rstrip("."))
        return (
            f"should this machine die now, Azure itself puts the traffic back to "
            f"{shares_text(before)} at {shown(at)} (never verified on live Azure)"
        )

    def _not(self, reason: str) -> str:
        return (
            f"should this machine die now, NOBODY puts the traffic back before the next phi3 up: "
            f"{reason}"
        )


def put_back_body(found: Body, before: Mapping[str, int], target: str) -> Body:
    """The PUT of an endpoint that was read as `found`, with the shares `before` and no rollout.

    Everything else is sent as it was read, since Azure takes what a PUT leaves out for removed.
    """
    properties = {k: v for k, v in found["properties"].items() if k not in _READ_ONLY_PROPERTIES}
    properties["traffic"] = dict(before)
    mirror = properties.get("mirrorTraffic") or {}
    properties["mirrorTraffic"] = {n: share for n, share in mirror.items() if n != target}
    body = {name: value for name, value in found.items() if name not in _READ_ONLY}
    body["properties"] = properties
    body["tags"] = {n: text for n, text in (found.get("tags") or {}).items() if n != ROLLOUT_TAG}
    identity = dict(found.get("identity") or {})
    if identity:
        # Of an identity Azure answers its ids, and takes its type and an empty object for each.
        users = identity.get("userAssignedIdentities")
        body["identity"] = {"type": identity["type"]} | (
            {"userAssignedIdentities": {user: {} for user in users}} if users else {}
        )
    return body
