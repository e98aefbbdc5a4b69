"""`phi3 azure check-live`: what to check first on a real subscription, step by step."""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console
from ..run import Run
from .common import add_command, add_recipe, add_rehearse, recipe_of

if TYPE_CHECKING:
    from ..targets.azure.check_live import LiveStep, Outcome


def register_check(inner: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        inner,
        "check-live",
        "list what to check first on a real subscription, cheapest first, with prices, and run it "
        "step by step, each undone afterwards; asks before each unless --yes (never verified on "
        "live Azure)",
        "phi3 azure check-live training/recipes/phi3-mini-azure.yaml",
        run_check,
    )
    add_recipe(parser)
    add_rehearse(parser)
    parser.set_defaults(on="azure")


def run_check(args: argparse.Namespace) -> int:
    """Print the list, then run what is agreed to; 1 when a step failed."""
    recipe = recipe_of(args.words, "azure")
    from ..targets.azure.check_live import list_steps, run_steps
    from ..targets.azure.clients import Clients
    from ..targets.azure.live_steps import LiveCheck, check_name, check_section
    from ..targets.azure.place import find_place
    from ..targets.azure.target import refuse_without_extra

    refuse_without_extra()
    name = check_name()
    place = find_place(recipe.azure, os.environ, Path.cwd())
    section = check_section(recipe.azure, place, name)
    with tempfile.TemporaryDirectory() as folder:
        own = find_place(section, {}, Path(folder))
        recipe = recipe.model_copy(update={"azure": section})
        run = Run.open(Path(folder) / name)
        check = LiveCheck(Clients(own, section.poll), recipe, run)
        steps = list_steps(check)
        asks = os.isatty(0) and args.output == "text" and not args.yes
        if args.output == "text":
            _show(steps, name, section.location or "")
        outcomes: list[Outcome] = []

        def told(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if args.output == "text":
                tail = f": {outcome.detail}" if outcome.detail else ""
                _line(f"{outcome.state:<8} {outcome.title}{tail}")

        def wanted(number: int, step: LiveStep) -> bool:
            text = f"{number}. {step.title} ({step.price})"
            if not args.yes:
                return _agreed(text)
            if args.output == "text":
                _line(text)
            return True

        if args.yes or asks:
            run_steps(check, steps, wanted, partial(console.progress_bar, "check"), told)
        elif args.output == "text":
            _line("Nothing was run. Run it: on a terminal, which asks before each step; or --yes")
    if args.output == "json":
        listed = [
            {"title": step.title, "price": step.price, "by_hand": list(step.commands)}
            for step in steps
        ]
        console.print_json({"steps": listed, "outcomes": [vars(item) for item in outcomes]})
    return 1 if any(item.state == "FAILED" for item in outcomes) else 0


def _show(steps: list[LiveStep], name: str, location: str) -> None:
    _line(f"What to check first in {location}, cheapest first (never verified on live Azure):")
    for number, step in enumerate(steps, start=1):
        _line(f"{number:>2}. {step.title}")
        _line(f"    {step.price}{'' if step.run else '; by hand:'}")
        for command in step.commands:
            _line(f"      {command}")
    _line(
        f"Steps 5 to 8 make all they need in the resource group {name} and delete it at the end. "
        f"Should this machine die meanwhile: az group delete --name {name}"
    )


def _agreed(question: str) -> bool:
    try:
        said = input(f"{question}: run it? [y/N] ")
    except EOFError:
        return False
    return said.strip().lower() in ("y", "yes")


def _line(text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True, highlight=False)
