"""`phi3 azure check-live`: the list of what to check first on Azure, cheapest first, and its run.

What a step made is deleted at its end, and everything at the end of all, also after a failure and
Ctrl-C. Never verified on live Azure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from ...errors import StageError
from ...progress import Progress
from .failures import explained
from .live_steps import CPU_SIZE, LiveCheck

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
