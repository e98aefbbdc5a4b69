"""`phi3 data check | prepare | show`: look at chats before anything is trained on them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import console
from ..journey import go
from ..stages_azure import stages_until
from .common import add_command, add_recipe, journey_of


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("data", help="check, prepare or show chats")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = add_command(
        actions, "check", "report every fault of chat files", "phi3 data check a.jsonl", run_check
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE")
    prepare = add_command(
        actions, "prepare", "check, split and copy the chats into the run", "phi3 data prepare",
        run_prepare,
    )  # fmt: skip
    add_recipe(prepare)
    show = add_command(
        actions, "show", "print conversations", "phi3 data show a.jsonl -n 3", run_show
    )
    show.add_argument("file", type=Path, metavar="FILE")
    show.add_argument("-n", type=_count, default=5, metavar="COUNT", help="how many (5)")


def run_check(args: argparse.Namespace) -> int:
    """Check files; exit 1 with all faults when there are any."""
    from ..data import check

    report = check(args.files)
    if args.output == "json":
        console.print_json(report.as_dict())
    else:
        for line in report.lines():
            console.out.print(line, markup=False)
    return 1 if report.faults else 0


def run_prepare(args: argparse.Namespace) -> int:
    """Do the first stage alone."""
    journey = journey_of(args)
    with journey.run.lock():
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages_until("dataset", journey.target.name))
    if args.output == "json":
        console.print_json(journey.run.manifest("dataset"))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print the first conversations of a file."""
    from ..data import show

    shown = show(args.file, args.n)
    if args.output == "json":
        console.print_json([conversation.to_dict() for conversation in shown])
        return 0
    for conversation in shown:
        place = f"{conversation.source.name}:{conversation.line}"
        console.out.print(place, style="dim", markup=False)
        for message in conversation.messages:
            console.out.print(f"  {message.role}: {message.content}", markup=False)
    return 0


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)
