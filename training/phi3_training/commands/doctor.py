"""`phi3 doctor`: looks for what silently goes wrong; today: tokens in training and in serving."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console
from ..errors import UsageError
from .common import add_command, all_runs, has_model_here, tuned_run

if TYPE_CHECKING:
    from ..parity import Places, Report


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "doctor",
        "check that training and serving write the same tokens",
        "phi3 doctor --tokens --run phi3-tiny",
        run_doctor,
    )
    parser.add_argument("--tokens", action="store_true", help="this check only, on a tuned model")
    parser.add_argument("--run", metavar="NAME", help="which run (default: the last trained)")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a model folder instead of a run"
    )


def run_doctor(args: argparse.Namespace) -> int:
    """Compare tokens everywhere; exit 1 when a place writes other ones."""
    report, reason = _tokens(args)
    if args.output == "json":
        found = {"skipped": reason} if report is None else report.as_dict()
        console.print_json({"tokens": found})
    else:
        for line in _lines(report, reason):
            console.out.print(line, markup=False)
    return 0 if report is None or report.ok else 1


def _tokens(args: argparse.Namespace) -> tuple[Report | None, str]:
    from ..parity import check_tokens

    places = _places(args)
    if places is None:
        return None, f"no tuned model under {args.runs} yet; make one with: phi3 train"
    return check_tokens(places), ""


def _places(args: argparse.Namespace) -> Places | None:
    """What is to be compared; None when nothing was named and there is nothing yet."""
    from ..parity import places_of_folder, places_of_run

    if args.model is not None:
        if args.run:
            raise UsageError("Give --run NAME or --model FOLDER, not both")
        return places_of_folder(args.model)
    named = args.tokens or args.run
    if not named and not any(has_model_here(run) for run in all_runs(args.runs)):
        return None
    return places_of_run(tuned_run(args))


def _lines(report: Report | None, reason: str) -> list[str]:
    if report is None:
        return [f"tokens: skipped, {reason}"]
    verdict = "the same everywhere" if report.ok else "DIFFERENT"
    head = f"tokens: {verdict} ({report.cases} conversations, compared with the trainer's rows)"
    return [head, *(f"  {line}" for line in report.lines())]
