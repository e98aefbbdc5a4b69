"""`phi3 azure rollback` and `phi3 azure traffic`: the traffic of a run's endpoint, by hand.

Reads and writes <run>/rollout.json (the shares from before a change, so that it can be undone) and
the run's endpoint.json, which names the deployment that the run is served by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from phi3_tool.errors import Phi3Error, one_line

from ...errors import StageError
from ...evaluate.rows import read_rows
from ...manifests import EndpointManifest, RolloutManifest
from ...progress import Progress, note
from ...recipe.azure import AzureSection
from ...run import Run
from .clients import Clients
from .deadline import settle_removals
from .deploy import access_to, read_endpoint
from .failures import explained
from .operations import state_of
from .place import ROLLOUT_TAG, recorded_resources
from .probes import fault_of
from .rollout import interrupted
from .traffic import Wanted, check_traffic, set_traffic, shares_text, traffic_shares


@dataclass(frozen=True)
class Held:
    """A deployment as it stands at its endpoint; `share` in percent of the traffic."""

    name: str
    share: int
    state: str
    model: str
    machines: str


@dataclass(frozen=True)
class Traffic:
    """An endpoint's traffic now, and what a rollback would go back to."""

    endpoint: str
    deployments: Sequence[Held]
    before: Mapping[str, int]
    unfinished: str = ""  # the deployment whose rollout nobody has ended
    removals: Sequence[str] = ()  # what deletes itself and when, in words

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    def lines(self, run: Run) -> list[str]:
        """For people."""
        lines = [f"endpoint {self.endpoint}: {shares_text(self._shares())}"]
        lines += [
            f"  {item.name}: {item.share} %, {item.state}, {item.machines}"
            for item in self.deployments
        ]
        idle = [item.name for item in self.deployments if not item.share]
        if idle:
            lines.append(
                f"without traffic, but billing: {', '.join(idle)}; delete with: phi3 down --on "
                f"azure --idle --run {run.name}"
            )
        lines += self.removals
        if self.unfinished:
            lines.append(
                f"the rollout of {self.unfinished} is not finished; finish it with: phi3 up "
                f"--run {run.name}, or undo it with: phi3 azure rollback --run {run.name}"
            )
        elif self.before and self.before != self._shares():
            lines.append(
                f"before the last change: {shares_text(self.before)}; go back with: phi3 azure "
                f"rollback --run {run.name}"
            )
        return lines

    def _shares(self) -> dict[str, int]:
        return {item.name: item.share for item in self.deployments if item.share}


def traffic_of(clients: Clients, run: Run) -> Traffic:
    """Who has how much of the run's endpoint. StageError where the run has none."""
    # The last deployment's endpoint; a run that was killed before it wrote that has its rollout or
    # its list of what it made.
    manifests = (run.read(EndpointManifest), run.read(RolloutManifest))
    names = [item.endpoint_name for item in manifests if item is not None and item.endpoint_name]
    names = names or [item.name for item in reversed(recorded_resources(run, "endpoint"))]
    if not names:
        raise StageError(f"The run {run.name!r} has no endpoint on Azure yet: phi3 up --on azure")
    endpoint = read_endpoint(clients, names[0])
    name, shares = str(endpoint.name), traffic_shares(endpoint.traffic)
    with explained(f"Listing the deployments of {name}"):
        listed = list(clients.ml.online_deployments.list(name))
    begun, record = interrupted(run, endpoint), run.read(RolloutManifest)
    known = record is not None and record.endpoint_name == name
    return Traffic(
        name,
        [
            Held(
                str(item.name),
                shares.get(str(item.name), 0),
                state_of(item),
                str(getattr(item, "model", "") or ""),
                f"{item.instance_count or 1} x {getattr(item, 'instance_type', None)}",
            )
            for item in listed
        ],
        begun.before if begun else record.before if known and record else {},
        begun.deployment if begun else "",
    )


def set_shares(
    clients: Clients,
    section: AzureSection,
    run: Run,
    wanted: Mapping[str, int],
    progress: Progress,
    *,
    unasked: bool = False,
) -> Traffic:
    """Give the traffic to deployments that answer one question first (or not, with `unasked`).

    Raises StageError where one does not answer, or Azure refuses; the traffic is then as before.
    """
    now = traffic_of(clients, run)
    shares = traffic_shares(wanted)
    check_traffic(shares, [item.name for item in now.deployments])
    if not unasked:
        _ask(clients, run, now.endpoint, shares, progress)
    # After an interrupted rollout those who had the traffic before it are the ones to go back to.
    before = now.before if now.unfinished else {d.name: d.share for d in now.deployments if d.share}
    record = RolloutManifest(
        endpoint_name=now.endpoint,
        deployment=_largest(shares),
        before=before,
        models={item.name: item.model for item in now.deployments},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        share=max(shares.values(), default=0),
        state="begun",
        reasons=[],
    )
    # Before the change, so that it can be undone from whatever becomes of this process.
    run.write(record)
    try:
        set_traffic(
            clients, section, now.endpoint, Wanted(shares, tags={ROLLOUT_TAG: None}), progress
        )
    except StageError:  # with the reason, and the shares that count
        run.write(record.model_copy(update={"state": "undone"}))
        raise
    run.write(record.model_copy(update={"state": "done"}))
    _served_by(run, now.endpoint, shares)
    return _settled(clients, section, run, progress)


def roll_back(clients: Clients, section: AzureSection, run: Run, progress: Progress) -> Traffic:
    """Give the traffic back to those who had it before the run's last change of it.

    Raises StageError where nobody had it, or they are not any more what they were.
    """
    now = traffic_of(clients, run)
    if not now.before:
        raise StageError(
            f"Nothing to roll back to: no deployment of {now.endpoint} is recorded to have had the "
            f"traffic before. See what there is with: phi3 azure traffic --run {run.name}"
        )
    record = run.read(RolloutManifest)
    # Which of those to go back to are gone, broken, or serve another model by now.
    there = {item.name: item for item in now.deployments}
    models = {} if record is None else record.models
    faults = []
    for name in now.before:
        item = there.get(name)
        if item is None:
            faults.append(f"{name} is gone")
        elif item.state != "succeeded":
            faults.append(f"{name} is {item.state}")
        elif models.get(name, item.model).lower() != item.model.lower():
            faults.append(f"{name} serves another model now ({item.model})")
    if faults:
        raise StageError(
            f"The traffic of {now.endpoint} cannot go back to {shares_text(now.before)}: "
            f"{'; '.join(faults)}. See what there is with: phi3 azure traffic --run {run.name}"
        )
    # They may have broken since: a rollback must not make things worse.
    _ask(clients, run, now.endpoint, now.before, progress)
    change = Wanted(
        now.before,
        unmirrored=now.unfinished or ("" if record is None else record.deployment),
        tags={ROLLOUT_TAG: None},
    )
    set_traffic(clients, section, now.endpoint, change, progress)
    if record is not None:
        update = {"state": "undone", "reasons": ["rolled back by hand"]}
        run.write(record.model_copy(update=update))
    _served_by(run, now.endpoint, now.before)
    return _settled(clients, section, run, progress)


def _settled(clients: Clients, section: AzureSection, run: Run, progress: Progress) -> Traffic:
    """The traffic now, when what has none deletes itself by what it is now."""
    found = traffic_of(clients, run)
    removals = settle_removals(clients, section, run, found.endpoint, progress)
    return replace(found, removals=removals)


def _ask(
    clients: Clients, run: Run, endpoint: str, shares: Mapping[str, int], progress: Progress
) -> None:
    """One question through the header of each; StageError with what did not answer it."""
    access, manifest = access_to(clients, endpoint), run.read(EndpointManifest)
    question = None if manifest is None else manifest.smoke.get("question")
    if not question:
        try:
            question = read_rows(run)[0]["question"]
        except StageError:  # killed before its first deployment, and without an evaluation
            question = "Who are you?"
    faults = []
    for name in shares:
        note(progress, f"asking {name}")
        # 200 s: a little more than Azure lets a request take (180 s).
        with access.client(deployment=name, max_retries=2, deadline=200.0) as client:
            try:
                messages = [{"role": "user", "content": str(question)}]
                fault = fault_of(client.chat(messages, temperature=0.0, max_new_tokens=64).text)
            except Phi3Error as error:
                fault = one_line(str(error))
        if fault:
            faults.append(f"{name}: {fault}")
    if faults:
        by_hand = " ".join(f"{name}={share}" for name, share in shares.items())
        raise StageError(
            f"Asked {question!r}, this is no answer: {'; '.join(faults)}. The traffic stays as it "
            f"is; change it all the same with: phi3 azure traffic set {by_hand} --force --run "
            f"{run.name}"
        )


def _served_by(run: Run, endpoint: str, shares: Mapping[str, int]) -> None:
    """Note in the endpoint's manifest who serves it, so that `up` takes it for done."""
    manifest = run.read(EndpointManifest)
    if manifest is not None and manifest.endpoint_name == endpoint and shares:
        # The run is served by whoever has most; `status` and `up` look at that one.
        update = {"deployment": _largest(shares), "traffic": dict(shares)}
        run.write(manifest.model_copy(update=update))


def _largest(shares: Mapping[str, int]) -> str:
    return max(shares, key=lambda name: shares[name], default="")
