"""`phi3 azure provision | quota | cancel | extend | budget | …`: what only Azure has."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console
from ..current import all_runs
from ..errors import MissingExtraError, StageError, UsageError
from ..manifests import EndpointManifest
from ..project import find
from ..recipe import Recipe
from ..run import Run
from ..targets import target_of
from . import HELP
from .azure_check import register_check
from .azure_traffic import register_traffic
from .common import (
    add_command,
    add_place,
    add_recipe,
    add_rehearse,
    current_run,
    place_in,
    recipe_of,
)

if TYPE_CHECKING:
    from ..recipe.azure import AzureSection
    from ..targets.azure.clients import Clients
    from ..targets.azure.sizes import Need

_ABOUT = HELP["azure"]


def register_azure(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser(
        "azure",
        help=_ABOUT,
        description=_ABOUT[0].upper() + _ABOUT[1:] + ".",
        epilog="example:\n  phi3 azure provision training/recipes/phi3-mini-lora.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run_command=lambda _args: _no_command(parser), debug=False)
    inner = parser.add_subparsers(dest="azure_command", metavar="COMMAND")
    _add_provision(inner)
    _add_quota(inner)
    cancel = add_command(
        inner,
        "cancel",
        "cancel a run's active jobs; they bill until then",
        "phi3 azure cancel --run phi3-mini-azure",
        run_cancel,
    )
    cancel.add_argument("--run", metavar="NAME", required=True, help="which run")
    add_rehearse(cancel)
    cancel.set_defaults(on="azure")
    extend = add_command(
        inner,
        "extend",
        "move the time at which a run's endpoint deletes itself",
        "phi3 azure extend 4h --run phi3-mini-azure",
        run_extend,
    )
    extend.add_argument("by", metavar="DURATION", help="how much later, such as 4h, 30m or 2d")
    extend.add_argument("--run", metavar="NAME", help="which run (default: the current one)")
    extend.add_argument(
        "--endpoint", metavar="NAME", help="the endpoint, without its run folder (another machine)"
    )
    add_place(extend, "look for the endpoint there, also without a run folder")
    add_rehearse(extend)
    extend.set_defaults(on="azure")
    budget = add_command(
        inner,
        "budget",
        "mail you when a month's costs of the resource group come near an amount; it comes a day "
        "late and stops nothing",
        "phi3 azure budget 50 --mail me@example.com",
        run_budget,
    )
    budget.add_argument("amount", type=float, metavar="AMOUNT", help="in the account's currency")
    budget.add_argument(
        "--mail", action="append", required=True, metavar="ADDRESS", help="where to (repeatable)"
    )
    budget.add_argument("--run", metavar="NAME", help="which run's resource group")
    add_rehearse(budget)
    budget.set_defaults(on="azure")
    register_traffic(inner)
    register_check(inner)


def _add_provision(inner: Any) -> None:
    parser = add_command(
        inner,
        "provision",
        "create what is missing: group, workspace, identity, roles, hub, project, GPU cluster",
        "phi3 azure provision training/recipes/phi3-mini-lora.yaml azure.location=eastus",
        run_provision,
    )
    add_recipe(parser)
    add_rehearse(parser)
    parser.set_defaults(on="azure")
    parser.add_argument(
        "--least-privilege",
        action="store_true",
        help="give the identity only the roles that a deployment needs "
        "(azure.least_privilege=true)",
    )


def _add_quota(inner: Any) -> None:
    parser = add_command(
        inner,
        "quota",
        "show the GPU quota that a recipe needs, or request more",
        "phi3 azure quota --request 48",
        run_quota,
    )
    add_recipe(parser)
    add_rehearse(parser)
    parser.set_defaults(on="azure")
    parser.add_argument(
        "--request", type=int, metavar="CORES", help="request this many cores in total"
    )
    parser.add_argument(
        "--family", metavar="NAME", help="quota of this family (default: the recipe's)"
    )


def _no_command(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2


def run_provision(args: argparse.Namespace) -> int:
    """Make what is missing, a line for each step; 1 when one failed."""
    words = [*args.words, *(["azure.least_privilege=true"] if args.least_privilege else [])]
    recipe = recipe_of(words, "azure")
    from ..targets.azure.provision import Step, provision

    clients = _clients(recipe)

    def report(step: Step) -> None:
        if args.output == "text":
            console.out.print(step.text(), markup=False)

    if args.output == "text":
        for line in clients.place.lines():
            console.note(line)
    with console.progress_bar("provision") as progress:
        done = provision(clients, recipe, progress, report)
    if args.output == "json":
        console.print_json(done.manifest().as_json())
    return 0


def run_quota(args: argparse.Namespace) -> int:
    """Show what is needed, used and allowed, or ask for more; 1 when it does not suffice."""
    recipe = recipe_of(args.words, "azure")
    from ..targets.azure.cores import taking_turns
    from ..targets.azure.sizes import quota_needs, short_of_quota

    clients = _clients(recipe)
    found = quota_needs(clients, recipe)
    if args.request is not None:
        return _request(args, clients, found)
    short = short_of_quota(found)
    if args.output == "json":
        console.print_json([{**vars(need), "enough": need not in short} for need in found])
    else:
        for need in found:
            mark = "too little" if need in short else "enough"
            console.out.print(f"{mark:<10} {need.text()}", markup=False)
        turns = taking_turns(found, recipe.azure)
        if turns:
            console.out.print(f"{'in turns':<10} {turns}", markup=False)
        if short:
            cores = max((need.used or 0) + need.cores for need in short)
            console.out.print(f"Request more with: phi3 azure quota --request {cores}")
    return 1 if short else 0


def _request(args: argparse.Namespace, clients: Clients, found: list[Need]) -> int:
    from ..targets.azure.sizes import request_quota, short_of_quota

    family = args.family or (short_of_quota(found) or found)[0].family
    if args.request < 1:
        raise UsageError(f"--request {args.request}: expected the number of cores, at least 1")
    with console.progress_bar("quota") as progress:
        answer = request_quota(clients, family, args.request, progress)
    if args.output == "json":
        console.print_json({"family": family, "requested": args.request, "answer": answer})
    else:
        console.out.print(f"{family}, {args.request} cores: {answer}", markup=False)
    return 0


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel what the run folder names and Azure still works on."""
    run = current_run(args)
    from ..targets.azure.jobs import cancel_all

    lines = cancel_all(_clients_of(run), run)
    if args.output == "json":
        console.print_json({"cancelled": lines})
    else:
        for line in lines or ["This run has no active job."]:
            console.out.print(line, markup=False)
    return 0


def run_extend(args: argparse.Namespace) -> int:
    """Move the deadline of the run's endpoint; print both times."""
    from ..recipe.azure import duration_of

    try:
        by = duration_of(args.by)
    except ValueError as error:
        raise UsageError(f"{args.by!r}: {error}") from None
    from ..targets.azure.deadline import extend_deadline, shown
    from ..targets.azure.inventory import cost_of

    clients, section, name = _endpoint_meant(args)
    with console.progress_bar("deadline") as progress:
        before, after = extend_deadline(clients, section, name, by, progress)
    if args.output == "json":
        console.print_json({"endpoint": name, "before": before.at, "deadline": after.at})
        return 0
    old = f"was {shown(before.at)}" if before.at else "had none"
    _line(f"{name}: {after.text()}; {old}; {cost_of(clients, name)}")
    return 0


def _endpoint_meant(args: argparse.Namespace) -> tuple[Clients, AzureSection, str]:
    """The endpoint of the run, else the one that --endpoint and the place name.

    Where no run folder is on this machine, the one that phi3's tags lead to.
    """
    from ..recipe.azure import AzureSection

    named = place_in(args)
    has_runs = any(target_of(run) == "azure" for run in all_runs(args.runs))
    if not named and args.endpoint is None and (args.run or has_runs):
        run = current_run(args)
        from ..targets.azure.place import endpoint_name, place_of, section_of

        clients, section = _clients_of(run), section_of(run)
        made = run.read(EndpointManifest)
        own = made.endpoint_name if made else endpoint_name(section, place_of(run), run)
        return clients, section, own
    if args.run is not None:
        raise UsageError("--run means its own endpoint: leave out --endpoint and the place")
    from ..targets.azure.target import AzureTarget

    places = AzureTarget().found(named)
    found = [
        (place, name)
        for place in places
        for name in place.endpoints
        if args.endpoint in (None, name)
    ]
    if not found:
        what = f"no endpoint {args.endpoint}" if args.endpoint else "no endpoint"
        where = ", ".join(place.label for place in places) or "the subscription"
        raise StageError(
            f"phi3 has made {what} in {where}. See what exists: phi3 status --on azure, with "
            "--subscription GUID or --workspace NAME for another place"
        )
    if len(found) > 1:
        listed = "\n".join(f"  {name} in the {place.label}" for place, name in found)
        raise UsageError(f"Which one? Add --endpoint NAME or --workspace NAME:\n{listed}")
    place, name = found[0]
    return place.clients, AzureSection(poll=place.clients.poll), name


def run_budget(args: argparse.Namespace) -> int:
    """Set a budget that mails on the run's resource group."""
    run = current_run(args)
    from ..targets.azure.budget import set_budget

    line = set_budget(_clients_of(run), args.amount, args.mail)
    if args.output == "json":
        console.print_json({"budget": line})
    else:
        _line(line)
    return 0


def _clients_of(run: Run) -> Clients:
    from ..targets.azure.clients import Clients
    from ..targets.azure.place import place_of, section_of
    from ..targets.azure.target import refuse_without_extra

    refuse_without_extra()
    return Clients(place_of(run), section_of(run).poll)


def _clients(recipe: Recipe) -> Clients:
    from ..targets.azure.clients import Clients
    from ..targets.azure.place import find_place
    from ..targets.azure.target import refuse_without_extra

    refuse_without_extra()
    place = find_place(recipe.azure, os.environ, Path.cwd())
    return Clients(place, recipe.azure.poll)


# `phi3 … --rehearse`: the same command inside a rehearsed Azure on this machine; and
# `phi3 rehearse start | stop | status | env | calls | fault`: the rehearsed Azure by itself.
# The rehearsed Azure is a separate program, `python -m phi3_rehearsal`, which this module starts
# and whose JSON it reads: phi3 must not know what it is rehearsed with. All of it is under
# <runs>/rehearsal, so that neither real runs nor the user's own Prompt flow store see it.

RECIPE = Path("training/recipes/phi3-tiny-azure.yaml")
_CALLS_SHOWN = 20
_USAGE = 2  # the exit status of a usage error


def azure_folder(runs: Path) -> Path:
    """Where the rehearsed Azure of a runs folder stores its state."""
    return runs.resolve() / "rehearsal" / "azure"


def _command(action: str, runs: Path, *words: str) -> list[str]:
    """`python -m phi3_rehearsal ACTION FOLDER …`. Raises MissingExtraError."""
    if importlib.util.find_spec("trustme") is None:
        raise MissingExtraError("trustme", "rehearsal")
    return [sys.executable, "-m", "phi3_rehearsal", action, str(azure_folder(runs)), *words]


# --- --rehearse ---


def run_rehearsed(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run `argv` without its --rehearse; the exit status of what ran inside."""
    home = args.runs.resolve() / "rehearsal"
    # Outside the folder with the rehearsed Azure's own state.
    os.environ["PF_HOME_DIRECTORY"] = str(home / "promptflow")
    inner = [sys.executable, "-m", "phi3_training.cli", *inner_words(args, argv, home / "runs")]
    command = _command("run", args.runs, "--", *inner)
    status = _wait(subprocess.Popen(command))  # noqa: S603 - our own commands, no shell
    if args.output == "text":
        console.err.print(
            "Rehearsed on this machine; not yet run against live Azure. Add --rehearse to the "
            "next command too; stop the rehearsal with: phi3 rehearse stop",
            markup=False,
        )
    return status


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status. Ctrl-C at a terminal reaches the child by itself; a signal does not."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                process.send_signal(signal.SIGINT)


def inner_words(args: argparse.Namespace, argv: Sequence[str], runs: Path) -> list[str]:
    """The command line inside: on Azure, in its own run folders, the tiny recipe if none."""
    words = _without_own(argv)
    words += ["--runs", str(runs)]
    if args.on is None and not args.run and not getattr(args, "named", None):
        words += ["--on", "azure"]
    named = any("=" not in word for word in getattr(args, "words", ()))
    if hasattr(args, "words") and not named and not args.run:
        place = 2 if words[0] == "azure" else 1  # after the command, and the command of `azure`
        words.insert(place, str(find(RECIPE).resolve()))
    return words


def _without_own(argv: Sequence[str]) -> list[str]:
    """Without --rehearse and --runs FOLDER."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word == "--runs":
            skip = True
        elif not (word.startswith("--runs=") or word == "--rehearse"):
            kept.append(word)
    return kept


# --- phi3 rehearse ---


def register_rehearse(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("rehearse", help=HELP["rehearse"])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, example: str, run: Callable[..., int]) -> Any:
        return add_command(actions, name, text, f"phi3 rehearse {example}", run)

    start = add("start", "start the rehearsed Azure", "start", run_start)
    start.add_argument(
        "--fault", action="append", default=[], metavar="FAULT", help="inject a fault (repeatable)"
    )
    stop = add("stop", "stop the rehearsal, its jobs and its servers", "stop", run_stop)
    stop.add_argument("--forget", action="store_true", help="also delete its state")
    add("status", "show whether it is running and what it contains", "status", run_status)
    add("env", "print the variables that point the Azure SDKs to it", 'env  # eval "$(…)"', run_env)
    clock = add(
        "clock",
        "show its clock or move it forward; what is due by then happens",
        "clock 9h",
        run_clock,
    )
    clock.add_argument("by", nargs="?", default="0m", metavar="DURATION", help="30m, 9h, 2d")
    calls = add("calls", "show the calls it answered", "calls -n 50", run_calls)
    calls.add_argument(
        "-n",
        type=int,
        default=_CALLS_SHOWN,
        metavar="COUNT",
        help=f"how many (default: {_CALLS_SHOWN})",
    )
    fault = add(
        "fault",
        "inject a fault: METHOD PATH KIND [name=value …]",
        "fault 'PUT */onlineEndpoints/* 429 retry-after=1 times=2'",
        run_fault,
    )
    fault.add_argument(
        "fault", nargs="?", metavar="FAULT", help="without it, list the pending faults"
    )
    fault.add_argument("--clear", action="store_true", help="clear all pending faults")


def run_start(args: argparse.Namespace) -> int:
    """Start it, or find the one that runs."""
    faults = [f"--fault={fault}" for fault in args.fault]
    return _shown(args, _ask(args, "start", *faults))


def run_stop(args: argparse.Namespace) -> int:
    """Stop it."""
    done = _ask(args, "stop", *(["--forget"] if args.forget else []))
    if args.output == "json":
        return _shown(args, done)
    said = "The rehearsed Azure is stopped" if done["stopped"] else "No rehearsed Azure is running"
    kept = " and its state is deleted" if args.forget else f"; its state is in {done['folder']}"
    _line(said + kept)
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Whether it runs, and its resources by type."""
    return _shown(args, _ask(args, "status"))


def run_env(args: argparse.Namespace) -> int:
    """The variables, for a shell."""
    environment = _ask(args, "env")
    if args.output == "json":
        console.print_json(environment)
        return 0
    for name, value in environment.items():
        _line(f"export {name}={shlex.quote(value)}")
    return 0


def run_clock(args: argparse.Namespace) -> int:
    """Move its clock, and say which workflows ran."""
    done = _ask(args, "clock", args.by)
    if args.output == "json":
        return _shown(args, done)
    _line(f"{done['time']} by the rehearsal's clock")
    for run in done["runs"]:
        _line(f"{run['time']} {run['workflow']}: {run['status']}")
    return 0


def run_calls(args: argparse.Namespace) -> int:
    """The journal's last calls."""
    calls = _ask(args, "calls", "-n", str(args.n))
    if args.output == "json":
        console.print_json(calls)
        return 0
    for call in calls:
        _line(f"{call['status']} {call['method']} {call['host']}{call['path']}")
    return 0


def run_fault(args: argparse.Namespace) -> int:
    """Inject a fault, or list the pending ones."""
    words = ["--clear"] if args.clear else []
    pending = _ask(args, "fault", *words, *([args.fault] if args.fault else []))
    if args.output == "json":
        console.print_json(pending)
        return 0
    for text in pending or ["No injected faults are pending."]:
        _line(text)
    return 0


def _ask(args: argparse.Namespace, action: str, *words: str) -> Any:
    """What the rehearsal's own program answers. Raises UsageError or StageError in its words."""
    command = _command(action, args.runs, *words)
    done = subprocess.run(  # noqa: S603 - our own program, no shell
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        text = done.stderr.strip() or f"The rehearsal ended with exit status {done.returncode}"
        raise UsageError(text) if done.returncode == _USAGE else StageError(text)
    return json.loads(done.stdout)


def _line(text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True, highlight=False)


def _shown(args: argparse.Namespace, value: dict[str, Any]) -> int:
    if args.output == "json":
        console.print_json(value)
        return 0
    for name, item in value.items():
        text = ", ".join(f"{n} {k}" for k, n in item.items()) if isinstance(item, dict) else item
        _line(f"{name:<10} {text}")
    return 0
