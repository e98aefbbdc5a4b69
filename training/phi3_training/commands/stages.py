"""`phi3 train | evaluate | register | deploy | connect`: the journey up to one stage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import console
from ..errors import UsageError
from ..journey import go
from ..run import Run
from ..stages_azure import stages_until
from .common import (
    add_adapter,
    add_allow,
    add_command,
    add_force,
    add_no_plan,
    add_recipe,
    journey_of,
)
from .searching import run_search
from .summary import show_comparison

# command: (its manifest, help)
STAGE_COMMANDS = {
    "train": ("model", "prepare the chats and fine-tune"),
    "evaluate": ("gate", "compare the base and the tuned model, and hold it against the gate"),
    "register": ("registration", "put the tuned model into the run's MLflow registry"),
    "deploy": ("endpoint", "start the endpoint of the tuned model"),
    "connect": ("connection", "write the Prompt flow connection to the endpoint"),
}


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    for name, (_manifest, help_text) in STAGE_COMMANDS.items():
        parser = add_command(
            subparsers,
            name,
            help_text,
            f"phi3 {name} training/recipes/phi3-tiny.yaml",
            run_stage,
        )
        add_recipe(parser)
        add_adapter(parser)
        add_no_plan(parser)
        if name == "train":
            add_allow(parser)
            parser.add_argument(
                "--search",
                type=Path,
                metavar="FILE",
                help="look for better settings, as the YAML file says (docs/search.md)",
            )
        if name in ("deploy", "connect"):
            add_force(parser)


def run_stage(args: argparse.Namespace) -> int:
    """Do what is missing up to the stage."""
    journey = journey_of(args)
    if getattr(args, "search", None) is not None:
        if journey.target.name != "local":
            raise UsageError("A search runs on this machine: leave out --on azure")
        return run_search(args, journey)
    manifest = STAGE_COMMANDS[args.command][0]
    with journey.run.lock():
        stages = stages_until(manifest, journey.target.name)
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages)
    if args.command == "evaluate":
        return _show_evaluation(journey.run, args.output)
    if args.output == "json":
        console.print_json(journey.run.manifest(manifest))
    return 0


def _show_evaluation(run: Run, form: str) -> int:
    """The figures and the gate's verdict; 1 where the model did not pass."""
    verdict = run.require("gate", "phi3 evaluate")
    if form == "json":
        console.print_json({**run.require("metrics", "phi3 evaluate"), "gate": verdict})
    else:
        show_comparison(run, every=True)
    return 0 if verdict["passed"] else 1
