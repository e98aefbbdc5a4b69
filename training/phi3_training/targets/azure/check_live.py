"""`phi3 azure check-live`: the list of what to check first on Azure, cheapest first, and its run.

What a step made is deleted at its end, and everything at the end of all, also after a failure and
Ctrl-C. Never verified on live Azure.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ...errors import StageError
from ...progress import Progress, note
from ...recipe import Recipe
from ...recipe.azure import AzureSection
from ...run import Run
from .clients import ARM, Clients
from .deadline import (
    TRIGGER,
    extend_deadline,
    hold_deadline,
    read_deadline,
    remove_deadline,
    workflow_id,
)
from .deploy import ensure_endpoint
from .failures import explained
from .jobs import WORKING, status_of
from .operations import create, delete, find, get_or_none, within
from .place import Place, resource_tags
from .provision import Step, provision
from .resources import DELETION_ORDER, SUBSCRIPTION_API, ensure_group
from .sizes import PRICE_DATE, PRICE_PAGE, RELEASE_SECONDS, find_size, quota_needs, short_of_quota
from .storage import OUTPUT_STORE, open_store
from .workflow import WORKFLOW_TYPE, WORKFLOWS_API, shown, utc_now

State = Literal["passed", "FAILED", "skipped", "by hand"]


@dataclass(frozen=True)
class LiveStep:
    """One thing to check; `run` None: by hand, with `commands`."""

    title: str
    price: str
    run: Callable[[Progress], str] | None = None
    commands: tuple[str, ...] = ()
    in_workspace: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one step."""

    title: str
    state: State
    detail: str = ""


def list_steps(check: LiveCheck) -> list[LiveStep]:
    """All of them, cheapest first, with prices; asks the price list and nothing else."""
    section = check.section
    cpu, gpu = check.price(CPU_SIZE), check.price(section.compute.size)
    by_hand = (
        "phi3 up training/recipes/phi3-tiny-azure.yaml --on azure --run phi3-check-tiny "
        f"azure.subscription_id={check.place.subscription_id} "
        "azure.resource_group=phi3-check-tiny azure.workspace_name=phi3-check-tiny "
        f"azure.location={check.place.location} azure.compute.size={section.compute.size} "
        f"azure.endpoint.instance_type={CPU_SIZE} azure.endpoint.deadline=1h",
        "phi3 down --on azure --all --run phi3-check-tiny",
    )
    return [
        LiveStep("sign-in, and the subscription can be read", "free", check.sign_in),
        LiveStep("the resource providers are registered", "free", check.providers),
        LiveStep("live prices of the recipe's sizes", "free", check.prices),
        LiveStep("sizes and quota in the region", "free", check.quota),
        LiveStep("a resource group, created and deleted", "free", check.group),
        LiveStep(
            "a workspace and an identity with its roles; an upload to the storage, read back",
            "some cents: registry, storage and logs, by the day and by use",
            check.upload,
        ),
        LiveStep(
            "the deadline: a Logic App that deletes an endpoint without deployment",
            "less than a cent",
            check.deadline,
            in_workspace=True,
        ),
        LiveStep(
            f"a cluster of 0 to 1 {CPU_SIZE}, a tiny job on it, and its node gone afterwards",
            f"some cents: about 20 minutes; {cpu}",
            check.cluster,
            in_workspace=True,
        ),
        LiveStep(
            "the whole way: train, deploy on a CPU size, ask one question, delete everything",
            f"endpoint, at most 2 hours: {cpu}; training, about half an hour: {gpu}",
            commands=by_hand,
        ),
    ]


def run_steps(
    check: LiveCheck,
    steps: Sequence[LiveStep],
    wanted: Callable[[int, LiveStep], bool],
    shown: Callable[[], AbstractContextManager[Progress]],
    report: Callable[[Outcome], None],
) -> None:
    """Do the steps that are `wanted`, from 1 on, and delete what they made, whatever happens.

    A failed step is reported and the next one runs, but nothing after a failed sign-in. `shown`
    opens a display of progress for one step.
    """
    # Without a sign-in each of the others would fail for the same reason, after its own wait.
    signed_in = True
    try:
        for number, step in enumerate(steps, start=1):
            if step.run is None:
                report(Outcome(step.title, "by hand"))
            elif not signed_in:
                report(Outcome(step.title, "skipped", "the sign-in failed"))
            elif step.in_workspace and not check.has_workspace:
                report(Outcome(step.title, "skipped", "it needs the workspace of step 6"))
            elif not wanted(number, step):
                report(Outcome(step.title, "skipped"))
            else:
                outcome = _outcome(step.title, step.run, shown)
                signed_in = outcome.state == "passed" or number > 1
                report(outcome)
    finally:
        if check.group_may_exist:
            report(_outcome("deletion of what is left", check.clean_up, shown))


def _outcome(
    title: str,
    work: Callable[[Progress], str],
    shown: Callable[[], AbstractContextManager[Progress]],
) -> Outcome:
    try:
        with shown() as progress, explained(title):
            return Outcome(title, "passed", work(progress))
    except StageError as error:
        return Outcome(title, "FAILED", " ".join(str(error).split()))


# --- the steps ---
# All that is made is in a resource group of the check's own, which carries its tag; nothing else is
# changed.

CHECK_TAG = "phi3-check"
CPU_SIZE = "Standard_DS3_v2"  # of the sizes without a GPU in our table, the smallest
_PROVIDERS = ("Microsoft.MachineLearningServices", WORKFLOW_TYPE.split("/")[0])
# A new role takes minutes to act ("Troubleshoot Azure RBAC": up to 10), and until then the workflow
# is refused, so it is fired once a minute for this long.
FIRED_SECONDS, _FIRED_PAUSE = 900.0, 60.0
# To then the check brings the deadline forward: before its time the workflow deletes nothing.
FIRED_LEAD = dt.timedelta(minutes=2)
_JOB_SECONDS = 1800.0  # of the tiny job, with the minutes in which its machine comes up
_IDLE_SECONDS = 120  # Azure's own default


def check_name() -> str:
    """A new name for group, workspace and endpoint, that nothing has yet."""
    return f"phi3-check-{secrets.token_hex(4)}"


def check_section(section: AzureSection, place: Place, name: str) -> AzureSection:
    """The recipe's sizes and waits in a place of the check's own; no other name is taken over."""
    # An hour, should even the deletion at the end of all fail.
    endpoint = {"name": name, "auth_mode": "key", "deadline": "1h"}
    return AzureSection(
        subscription_id=place.subscription_id,
        tenant_id=place.tenant_id,
        location=place.location,
        resource_group=name,
        workspace_name=name,
        least_privilege=True,  # a check needs no Contributor on the group
        tags={**section.tags, CHECK_TAG: name},
        compute=section.compute,
        train=section.train,
        endpoint=section.endpoint.model_copy(update=endpoint),
        poll=section.poll,
    )


class LiveCheck:
    """One check. `clients` and the recipe's `azure:` section are those of `check_section`."""

    def __init__(self, clients: Clients, recipe: Recipe, run: Run) -> None:
        self.clients, self.recipe, self.run = clients, recipe, run
        self.section, self.place = recipe.azure, clients.place
        self.name, self.tags = self.place.resource_group, resource_tags(recipe.azure)
        self.has_workspace = False
        self.group_may_exist = False
        self._makes = partial(
            create, limit=self.section.poll.provision_timeout, pause=self.section.poll.interval
        )
        self._deletes = partial(
            delete, limit=self.section.poll.delete_timeout, pause=self.section.poll.interval
        )

    def price(self, size: str) -> str:
        """What a machine costs per hour, for people."""
        price = self.clients.prices.hourly(size, self.place.location)
        if price is None:
            return f"price of {size} unknown: see {PRICE_PAGE}"
        return f"{price.per_hour(1)} USD per hour of {size} ({price.source})"

    # --- free ---

    def sign_in(self, _progress: Progress) -> str:
        """Sign in and read the subscription."""
        scope = self.place.subscription_scope
        subscription: Any = self.clients.resources.resources.get_by_id(
            scope, api_version=SUBSCRIPTION_API
        )
        state = subscription.get("state")
        if state != "Enabled":
            raise StageError(f"the subscription is {state}, expected Enabled: see the portal")
        return f"{subscription.get('displayName')}, tenant {subscription.get('tenantId')}"

    def providers(self, _progress: Progress) -> str:
        """Read which providers are registered; registers none."""
        names = sorted({*_PROVIDERS, *(kind.arm_type.split("/")[0] for kind in DELETION_ORDER)})
        read = self.clients.resources.providers.get
        missing = [n for n in names if str(read(n).registration_state).lower() != "registered"]
        if missing:
            fixes = "; ".join(f"az provider register --namespace {name}" for name in missing)
            raise StageError(
                f"not registered: {', '.join(missing)}. Fix: {fixes}. (The workspace's and the "
                "deadline's step register what they need, and it stays registered)"
            )
        return f"{len(names)} registered"

    def prices(self, _progress: Progress) -> str:
        """Look whether the price list itself names a price for each size."""
        prices, region = self.clients.prices, self.place.location
        sizes = dict.fromkeys(
            (self.section.compute.size, self.section.endpoint.instance_type, CPU_SIZE)
        )
        found = {size: prices.hourly(size, region) for size in sizes}
        not_live = [
            size for size, price in found.items() if not price or price.source.endswith(PRICE_DATE)
        ]
        if not_live:
            raise StageError(
                f"no live price of {', '.join(not_live)} in {region}: plan uses a dated table or "
                f"names {PRICE_PAGE}"
            )
        return "; ".join(self.price(size) for size in found)

    def quota(self, _progress: Progress) -> str:
        """Read sizes and quota."""
        needs = quota_needs(self.clients, self.recipe)
        find_size(self.clients, CPU_SIZE, "the size of this check's cluster,")
        short = short_of_quota(needs)
        if short:
            lines = "; ".join(need.text() for need in short)
            raise StageError(f"too little quota: {lines}. Fix: phi3 azure quota --request CORES")
        return "; ".join(need.text() for need in needs)

    def group(self, progress: Progress) -> str:
        """Create the check's resource group and delete it."""
        with _undoing(partial(self.clean_up, progress)):
            self._own_group(progress)
        return f"{self.name} created and deleted"

    # --- cents ---

    def upload(self, progress: Progress) -> str:
        """Create workspace and identity; write a blob, read it and delete it."""
        self._own_group(progress)
        made: list[Step] = []
        provision(self.clients, self.recipe, progress, made.append, parts=("workspace", "roles"))
        container, _ = open_store(self.clients, OUTPUT_STORE, self.name)
        blob = container.upload_blob(f"{self.name}/check.txt", self.name.encode(), overwrite=True)
        read = blob.download_blob().readall()
        blob.delete_blob()
        if read != self.name.encode():
            raise StageError("the upload came back with other content")
        self.has_workspace = True
        created = [step.what for step in made if step.state == "created"]
        return f"created: {', '.join(created)}; an upload was read back"

    def deadline(self, progress: Progress) -> str:
        """Create an endpoint and its workflow; fire that now, and wait until the endpoint is gone.

        StageError where no deadline holds, or the workflow deletes nothing.
        """
        operations = self.clients.ml.online_endpoints
        read = partial(operations.get, self.name)

        def undo() -> None:
            start = partial(operations.begin_delete, self.name)
            self._deletes(f"Deleting the endpoint {self.name}", start, read, progress)
            remove_deadline(self.clients, self.name, progress)

        with _undoing(undo):
            endpoint, _ = ensure_endpoint(self.clients, self.section, self.run, self.name, progress)
            sentence = hold_deadline(self.clients, self.section, self.run, endpoint, progress)
            held = read_deadline(self.clients, self.name)  # with the trigger's time and the role
            if held.at is None or not held.holds:
                raise StageError(held.fault or sentence)
            sooner = utc_now() + FIRED_LEAD - held.at
            extend_deadline(self.clients, self.section, self.name, sooner, progress)
            runs = self._fire(read, progress)
        return (
            f"Azure named {shown(held.at)} and the role; brought forward and fired by hand, the "
            f"workflow deleted the endpoint; its runs: {runs}"
        )

    def _fire(self, read: Callable[[], object], progress: Progress) -> str:
        """Fire the workflow until the endpoint is gone; the status of each of its runs."""
        from azure.core.rest import HttpRequest

        workflow = ARM + workflow_id(self.place, self.name)
        version = {"api-version": WORKFLOWS_API}
        # "Workflow Triggers - Run" (REST, 2019-05-01).
        fire = HttpRequest("POST", f"{workflow}/triggers/{TRIGGER}/run", params=version)
        arm, began, fired = self.clients.arm(), time.monotonic(), 0
        doing = "Waiting until the workflow has deleted the endpoint"

        def runs() -> str:
            answer = arm.send_request(HttpRequest("GET", f"{workflow}/runs", params=version))
            answer.raise_for_status()
            statuses = [str(run["properties"]["status"]) for run in answer.json()["value"]]
            return ", ".join(statuses) or "none listed"

        while get_or_none(read, doing) is not None:
            seconds = time.monotonic() - began
            if seconds > FIRED_SECONDS:
                raise StageError(
                    f"the workflow was fired and the endpoint still exists, so no deadline would "
                    f"hold here; its runs: {runs()}"
                )
            if seconds >= fired * _FIRED_PAUSE:
                arm.send_request(fire).raise_for_status()
                fired += 1
            note(progress, f"{doing}, {seconds:.0f} s")
            time.sleep(self.section.poll.interval)
        return runs()

    def cluster(self, progress: Progress) -> str:
        """Create a cluster of 0 to 1 machines, run `echo` on it, see its node go, and delete it."""
        from azure.ai.ml import command
        from azure.ai.ml.entities import AmlCompute, Environment

        name, ml = "phi3-check-cpu", self.clients.ml
        read = partial(ml.compute.get, name)
        body = AmlCompute(
            name=name,
            size=CPU_SIZE,
            min_instances=0,
            max_instances=1,
            idle_time_before_scale_down=_IDLE_SECONDS,
            location=self.place.location,
            tags=self.tags,
        )
        job = command(
            name=self.name,
            command="echo ready",
            environment=Environment(image=self.section.train.environment.image),
            compute=name,
            experiment_name=self.section.train.experiment_name,
            timeout=int(_JOB_SECONDS),
            tags=self.tags,
        )
        undo = partial(ml.compute.begin_delete, name)
        with _undoing(partial(self._deletes, f"Deleting the cluster {name}", undo, read, progress)):
            start = partial(ml.compute.begin_create_or_update, body)
            self._makes(f"Creating the cluster {name}", start, read, progress)
            submit = partial(ml.jobs.create_or_update, job)
            limit = self.section.poll.upload_timeout
            within(f"submitting the job {self.name}", submit, progress, limit=limit)
            status, began = "queued", time.monotonic()
            while status in WORKING and time.monotonic() - began < _JOB_SECONDS:
                time.sleep(self.section.poll.job_interval)
                status = status_of(ml.jobs.get(self.name))
                note(progress, f"the job is {status}, {time.monotonic() - began:.0f} s")
            if status != "completed":
                raise StageError(f"the job {self.name} is {status}, expected completed")
            # Until the cluster has no node it bills, whatever its job does.
            ended, most = time.monotonic(), _IDLE_SECONDS + RELEASE_SECONDS
            with explained(f"Listing the nodes of {name}"):
                while nodes := len(list(ml.compute.list_nodes(name))):
                    seconds = time.monotonic() - ended
                    if seconds > most:
                        raise StageError(
                            f"the cluster still has {nodes} node(s) {seconds:.0f} s after its job, "
                            f"and they bill; expected none after {_IDLE_SECONDS} s and the minutes "
                            "that Azure takes. It is deleted with this check"
                        )
                    note(progress, f"waiting until its {nodes} node(s) are gone, {seconds:.0f} s")
                    time.sleep(self.section.poll.interval)
            released = time.monotonic() - ended
        return (
            f"the job completed in {ended - began:.0f} s; {released:.0f} s later the cluster had "
            "no node any more; it is deleted"
        )

    # --- the check's own group ---

    def _own_group(self, progress: Progress) -> None:
        """Create it. StageError where the name is taken; what is there then stays as it is."""
        self.group_may_exist = True
        if ensure_group(self.clients, self.tags, progress) == "exists":
            raise StageError(f"the resource group {self.name} exists already and is left alone")

    def clean_up(self, progress: Progress) -> str:
        """Delete the group with all that is in it, where it carries this check's tag."""
        groups = self.clients.resources.resource_groups
        group = find("resource group", self.name, groups.get)
        if group is not None and (group.tags or {}).get(CHECK_TAG) == self.name:
            start, read = partial(groups.begin_delete, self.name), partial(groups.get, self.name)
            try:
                self._deletes(f"Deleting the resource group {self.name}", start, read, progress)
            except StageError as error:
                raise StageError(
                    f"{error}; it may bill: az group delete --name {self.name}"
                ) from None
        self.group_may_exist = False
        return f"the resource group {self.name} is gone, with all that was in it"


@contextlib.contextmanager
def _undoing(undo: Callable[[], object]) -> Iterator[None]:
    """Undo afterwards. After a failure its reason counts: the whole group goes at the end."""
    try:
        yield
    except BaseException:  # also on Ctrl-C: what was made may bill
        with contextlib.suppress(StageError):
            undo()
        raise
    undo()
