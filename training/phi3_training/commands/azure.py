"""`phi3 azure provision | quota | cancel | extend | budget | rollback | traffic | check-live`.

What only Azure has, and no stage of the journey does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import console
from ..errors import StageError, UsageError
from ..manifests import EndpointManifest
from ..run import Run
from ..runs import all_runs
from ..targets import target_of
from . import HELP
from .common import current_run, recipe_of
from .options import (
    Command,
    Subparsers,
    add_command,
    add_place,
    add_recipe,
    add_rehearse,
    add_run,
    place_in,
)

if TYPE_CHECKING:
    from ..recipe import AzureSection
    from ..targets.azure.check_live import LiveStep, Outcome
    from ..targets.azure.clients import Clients
    from ..targets.azure.rollback import Traffic


def register_azure(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    about = HELP["azure"]
    parser = subparsers.add_parser(
        "azure",
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog="example:\n  phi3 azure provision training/recipes/phi3-mini-lora.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def show_help(_args: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    parser.set_defaults(run_command=show_help, debug=False)
    inner = parser.add_subparsers(dest="azure_command", metavar="COMMAND")
    _register_recipe_commands(inner)
    _register_run_commands(inner)


def _register_recipe_commands(inner: Subparsers) -> None:
    """Those that need a recipe and no run."""
    provision = add_command(
        inner,
        "provision",
        "create what is missing: group, workspace, identity, roles, hub, project, GPU cluster",
        "phi3 azure provision training/recipes/phi3-mini-lora.yaml azure.location=eastus",
        run_provision,
    )
    provision.add_argument(
        "--least-privilege",
        action="store_true",
        help="give the identity only the roles that a deployment needs "
        "(azure.least_privilege=true)",
    )
    quota = add_command(
        inner,
        "quota",
        "show the GPU quota that a recipe needs, or request more",
        "phi3 azure quota --request 48",
        run_quota,
    )
    quota.add_argument(
        "--request", type=int, metavar="CORES", help="request this many cores in total"
    )
    quota.add_argument(
        "--family", metavar="NAME", help="quota of this family (default: the recipe's)"
    )
    check = add_command(
        inner,
        "check-live",
        "list what to check first on a real subscription, cheapest first, with prices, and run it "
        "step by step, undoing each step; asks before each unless --yes (never verified on live "
        "Azure)",
        "phi3 azure check-live training/recipes/phi3-mini-azure.yaml",
        run_check,
    )
    for parser in (provision, quota, check):
        add_recipe(parser)
        add_rehearse(parser)
        parser.set_defaults(on="azure")


def _register_run_commands(inner: Subparsers) -> None:
    """Those that work on what a run has on Azure."""

    def add(name: str, help_text: str, example: str, run: Command) -> argparse.ArgumentParser:
        parser = add_command(inner, name, help_text, f"phi3 azure {example}", run)
        if name == "cancel":  # never by accident another run's
            add_run(parser, "which run", required=True)
        else:
            add_run(parser)
        add_rehearse(parser)
        parser.set_defaults(on="azure")
        return parser

    add(
        "cancel",
        "cancel a run's active jobs; they bill until then",
        "cancel --run phi3-mini-azure",
        run_cancel,
    )
    extend = add(
        "extend",
        "postpone the time at which a run's endpoint deletes itself",
        "extend 4h --run phi3-mini-azure",
        run_extend,
    )
    extend.add_argument("by", metavar="DURATION", help="how much later, such as 4h, 30m or 2d")
    extend.add_argument(
        "--endpoint", metavar="NAME", help="the endpoint, without its run folder (another machine)"
    )
    add_place(extend, "look for the endpoint there, also without a run folder")
    budget = add(
        "budget",
        "mail you when the monthly cost of the run's resource group approaches an amount; the mail "
        "is up to a day late and stops nothing",
        "budget 50 --mail me@example.com",
        run_budget,
    )
    budget.add_argument("amount", type=float, metavar="AMOUNT", help="in the account's currency")
    budget.add_argument(
        "--mail", action="append", required=True, metavar="ADDRESS", help="where to (repeatable)"
    )
    add(
        "rollback",
        "restore the traffic to what it was before the last change",
        "rollback --run phi3-mini-azure",
        run_rollback,
    )
    traffic = add(
        "traffic",
        "show or set each deployment's share of the traffic",
        "traffic set v1-5f3c2a=90 v2-09ab4e=10 --run phi3-mini-azure",
        run_traffic,
    )
    traffic.add_argument(
        "action",
        nargs="?",
        choices=("show", "set"),
        default="show",
        help="show (the default), or set the shares that follow",
    )
    traffic.add_argument(
        "shares", nargs="*", metavar="NAME=PERCENT", help="deployments and their shares, 100 in all"
    )
    traffic.add_argument(
        "--force", action="store_true", help="with set: even if a deployment does not answer"
    )


def run_provision(args: argparse.Namespace) -> int:
    """Create what is missing, a line for each step; 1 when one failed."""
    # As a word of the recipe, so that plan, up and this command read it in one place.
    words = [*args.words, *(["azure.least_privilege=true"] if args.least_privilege else [])]
    recipe = recipe_of(words, "azure")
    from ..targets.azure.provision import Step, provision
    from ..targets.azure.target import clients_at

    clients = clients_at(recipe.azure)

    def report(step: Step) -> None:
        if args.output == "text":
            console.line(step.text())

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
    from ..targets.azure.sizes import quota_needs, request_quota, short_of_quota, taking_turns
    from ..targets.azure.target import clients_at

    clients = clients_at(recipe.azure)
    needs = quota_needs(clients, recipe)
    short = short_of_quota(needs)
    if args.request is not None:
        if args.request < 1:
            raise UsageError(f"--request {args.request}: expected the number of cores, at least 1")
        # The one that is short, if any: that is what people come here for.
        family = args.family or (short or needs)[0].family
        # Azure may take minutes to grant it, or says that support must.
        with console.progress_bar("quota") as progress:
            answer = request_quota(clients, family, args.request, progress)
        return console.show(
            args.output,
            {"family": family, "requested": args.request, "answer": answer},
            f"{family}, {args.request} cores: {answer}",
        )
    lines = [f"{'too little' if need in short else 'enough':<10} {need.text()}" for need in needs]
    if turns := taking_turns(needs, recipe.azure):
        lines.append(f"{'in turns':<10} {turns}")
    if short:
        # In total, as a quota is: what is used, and what the recipe needs besides.
        cores = max((need.used or 0) + need.cores for need in short)
        lines.append(f"Request more with: phi3 azure quota --request {cores}")
    rows = [{**vars(need), "enough": need not in short} for need in needs]
    console.show(args.output, rows, *lines)
    return 1 if short else 0


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel what the run folder names and Azure still works on."""
    run = current_run(args)
    from ..targets.azure.jobs import cancel_all
    from ..targets.azure.target import clients_of

    # By name from the run folder: jobs of other runs in the workspace stay.
    lines = cancel_all(clients_of(run), run)
    shown = lines or ["This run has no active job."]
    return console.show(args.output, {"cancelled": lines}, *shown)


def run_extend(args: argparse.Namespace) -> int:
    """Move the deadline of the run's endpoint; print both times."""
    from ..recipe.azure import duration_of

    try:
        # Before Azure is asked anything: a typing mistake needs no sign-in.
        by = duration_of(args.by)
    except ValueError as error:
        raise UsageError(f"{args.by!r}: {error}") from None
    from ..targets.azure.deadline import extend_deadline
    from ..targets.azure.status import cost_of
    from ..targets.azure.workflow import shown

    clients, section, name = _endpoint_meant(args)
    with console.progress_bar("deadline") as progress:
        before, after = extend_deadline(clients, section, name, by, progress)
    if args.output == "json":
        console.print_json({"endpoint": name, "before": before.at, "deadline": after.at})
        return 0
    old = f"was {shown(before.at)}" if before.at else "had none"
    console.line(f"{name}: {after.text()}; {old}; {cost_of(clients, name)}")
    return 0


def _endpoint_meant(args: argparse.Namespace) -> tuple[Clients, AzureSection, str]:
    """The endpoint of the run, else the one that --endpoint and the place name.

    Where no run folder is on this machine, the one that phi3's tags lead to.
    """
    from ..recipe.azure import AzureSection
    from ..targets.azure.place import endpoint_name, place_of, section_of
    from ..targets.azure.target import AzureTarget, clients_of

    named = place_in(args)
    has_runs = any(target_of(run) == "azure" for run in all_runs(args.runs))
    if not named and args.endpoint is None and (args.run or has_runs):
        run = current_run(args)
        section, manifest = section_of(run), run.read(EndpointManifest)
        name = manifest.endpoint_name if manifest else endpoint_name(section, place_of(run), run)
        return clients_of(run), section, name
    if args.run is not None:
        raise UsageError("--run means its own endpoint: leave out --endpoint and the place")
    # By the tags that phi3 puts on what it creates: another machine has no run folder of it.
    places = AzureTarget().found(named)
    endpoints = [
        (place, name)
        for place in places
        for name in place.endpoints
        if args.endpoint in (None, name)
    ]
    if not endpoints:
        what = f"no endpoint {args.endpoint}" if args.endpoint else "no endpoint"
        where = ", ".join(place.label for place in places) or "the subscription"
        raise StageError(
            f"phi3 has made {what} in {where}. See what exists: phi3 status --on azure, with "
            "--subscription GUID or --workspace NAME for another place"
        )
    if len(endpoints) > 1:
        listed = "\n".join(f"  {name} in the {place.label}" for place, name in endpoints)
        raise UsageError(f"Which one? Add --endpoint NAME or --workspace NAME:\n{listed}")
    place, name = endpoints[0]
    return place.clients, AzureSection(poll=place.clients.poll), name


def run_budget(args: argparse.Namespace) -> int:
    """Set a budget that mails on the run's resource group."""
    run = current_run(args)
    from ..targets.azure.costs import set_budget
    from ..targets.azure.target import clients_of

    line = set_budget(clients_of(run), args.amount, args.mail)
    return console.show(args.output, {"budget": line}, line)


def run_rollback(args: argparse.Namespace) -> int:
    """Undo the last change of the traffic, or a rollout that was interrupted."""
    run = current_run(args)
    from ..targets.azure.place import section_of
    from ..targets.azure.rollback import roll_back
    from ..targets.azure.target import clients_of

    clients = clients_of(run)
    # Locked: a `phi3 deploy` of the same run moves the same traffic.
    with run.lock(), console.progress_bar("rollback") as progress:
        traffic = roll_back(clients, section_of(run), run, progress)
    return _show_traffic(args, traffic, run)


def run_traffic(args: argparse.Namespace) -> int:
    """Show the shares, or set them."""
    # Else `phi3 azure traffic blue=90` would show, and look as if it had set.
    if args.action == "show" and (args.shares or args.force):
        raise UsageError("Shares are set with: phi3 azure traffic set NAME=PERCENT …")
    wanted = parse_shares(args.shares) if args.action == "set" else {}
    run = current_run(args)
    from ..targets.azure.place import section_of
    from ..targets.azure.rollback import set_shares, traffic_of
    from ..targets.azure.target import clients_of

    clients = clients_of(run)
    if args.action == "show":
        return _show_traffic(args, traffic_of(clients, run), run)
    with run.lock(), console.progress_bar("traffic") as progress:
        section = section_of(run)
        traffic = set_shares(clients, section, run, wanted, progress, unasked=args.force)
    return _show_traffic(args, traffic, run)


def parse_shares(words: list[str]) -> dict[str, int]:
    """`blue=90 green=10` as numbers. Raises UsageError."""
    shares = {}
    for word in words:
        name, equals, share = word.partition("=")
        if not (name and equals and share.isdecimal()):
            raise UsageError(f"{word!r}: expected NAME=PERCENT, for example blue=90 green=10")
        shares[name] = int(share)
    if not shares:
        raise UsageError("Which shares? For example: phi3 azure traffic set blue=90 green=10")
    return shares


def _show_traffic(args: argparse.Namespace, traffic: Traffic, run: Run) -> int:
    return console.show(args.output, traffic.as_json(), *traffic.lines(run))


def run_check(args: argparse.Namespace) -> int:
    """Print the list, then run the confirmed steps; 1 when a step failed."""
    recipe = recipe_of(args.words, "azure")
    from ..targets.azure.check_live import (
        LiveCheck,
        check_name,
        check_section,
        list_steps,
        run_steps,
    )
    from ..targets.azure.clients import Clients
    from ..targets.azure.place import find_place
    from ..targets.azure.target import clients_at

    is_text = args.output == "text"
    # A group of its own for the check: deleting it at the end deletes nothing else.
    name = check_name()
    section = check_section(recipe.azure, clients_at(recipe.azure).place, name)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe.model_copy(update={"azure": section})
        run = Run.open(Path(folder) / name)
        # Its own place: neither the environment nor config.json names another one.
        clients = Clients(find_place(section, {}, Path(folder)), section.poll)
        check = LiveCheck(clients, recipe, run)
        steps = list_steps(check)
        if is_text:
            _show_steps(steps, name, section.location or "")
        outcomes: list[Outcome] = []

        def report(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if is_text:
                tail = f": {outcome.detail}" if outcome.detail else ""
                console.line(f"{outcome.state:<8} {outcome.title}{tail}")

        def is_wanted(number: int, step: LiveStep) -> bool:
            text = f"{number}. {step.title} ({step.price})"
            if args.yes:
                if is_text:
                    console.line(text)
                return True
            try:
                typed = input(f"{text}: run it? [y/N] ")
            except EOFError:
                return False
            return typed.strip().lower() in ("y", "yes")

        # Never unasked: steps from the fifth on create what bills.
        if args.yes or (os.isatty(0) and is_text):
            run_steps(check, steps, is_wanted, partial(console.progress_bar, "check"), report)
        elif is_text:
            console.line(
                "Nothing was run. Run it: on a terminal, which asks before each step; or --yes"
            )
    if not is_text:
        listed = [
            {"title": step.title, "price": step.price, "by_hand": list(step.commands)}
            for step in steps
        ]
        console.print_json({"steps": listed, "outcomes": [vars(item) for item in outcomes]})
    return 1 if any(item.state == "FAILED" for item in outcomes) else 0


def _show_steps(steps: list[LiveStep], name: str, location: str) -> None:
    console.line(
        f"What to check first in {location}, cheapest first (never verified on live Azure):"
    )
    for number, step in enumerate(steps, start=1):
        console.line(f"{number:>2}. {step.title}")
        console.line(f"    {step.price}{'' if step.run else '; by hand:'}")
        for command in step.commands:
            console.line(f"      {command}")
    console.line(
        f"Steps 5 to 8 create everything they need in the resource group {name} and delete it at "
        f"the end. If this machine dies in the meantime: az group delete --name {name}"
    )
