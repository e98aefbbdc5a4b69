"""`phi3 azure rollback | traffic`: who answers the requests of a run's endpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .. import console
from ..errors import UsageError
from ..run import Run
from .common import add_command, add_rehearse, current_run

if TYPE_CHECKING:
    from ..recipe.azure import AzureSection
    from ..targets.azure.clients import Clients
    from ..targets.azure.rollback import Traffic


def register_traffic(inner: Any) -> None:
    """Add the commands of this module."""
    rollback = add_command(
        inner,
        "rollback",
        "give the traffic back to the deployments that had it before the last change",
        "phi3 azure rollback --run phi3-mini-azure",
        run_rollback,
    )
    traffic = add_command(
        inner,
        "traffic",
        "show or set each deployment's share of the traffic",
        "phi3 azure traffic set v1-5f3c2a=90 v2-09ab4e=10 --run phi3-mini-azure",
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
        "--force", action="store_true", help="set: also where a deployment does not answer"
    )
    for parser in (rollback, traffic):
        parser.add_argument("--run", metavar="NAME", help="which run (default: the current one)")
        add_rehearse(parser)
        parser.set_defaults(on="azure")


def run_rollback(args: argparse.Namespace) -> int:
    """Undo the last change of the traffic, or a rollout that was interrupted."""
    run = current_run(args)
    from ..targets.azure.rollback import roll_back

    clients, section = _of(run)
    with run.lock(), console.progress_bar("rollback") as progress:
        found = roll_back(clients, section, run, progress)
    return _shown(args, found, run)


def run_traffic(args: argparse.Namespace) -> int:
    """Show the shares, or set them."""
    if args.action == "show" and (args.shares or args.force):
        raise UsageError("Shares are set with: phi3 azure traffic set NAME=PERCENT …")
    wanted = parse_shares(args.shares) if args.action == "set" else {}
    run = current_run(args)
    from ..targets.azure.rollback import set_shares, traffic_of

    clients, section = _of(run)
    if args.action == "show":
        return _shown(args, traffic_of(clients, run), run)
    with run.lock(), console.progress_bar("traffic") as progress:
        found = set_shares(clients, section, run, wanted, progress, unasked=args.force)
    return _shown(args, found, run)


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


def _of(run: Run) -> tuple[Clients, AzureSection]:
    from ..targets.azure.clients import Clients
    from ..targets.azure.place import place_of, section_of
    from ..targets.azure.target import refuse_without_extra

    refuse_without_extra()
    section = section_of(run)
    return Clients(place_of(run), section.poll), section


def _shown(args: argparse.Namespace, found: Traffic, run: Run) -> int:
    if args.output == "json":
        console.print_json(found.as_json())
        return 0
    for line in found.lines(run):
        console.out.print(line, markup=False)
    return 0
