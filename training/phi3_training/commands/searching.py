"""`phi3 train RECIPE --search FILE`: many trainings, the best settings kept as a recipe."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from typing import Any

from .. import console
from ..errors import MissingExtraError
from ..journey import Journey
from ..recipe import Recipe
from .common import from_options, recipe_of


def run_search(args: argparse.Namespace, journey: Journey) -> int:
    """Do the trials that are missing and show what was found."""
    from ..search.plan import load_plan

    def make(overrides: Sequence[str]) -> Recipe:
        return recipe_of([*args.words, *from_options(args), *overrides])

    plan = load_plan(args.search, make)
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("optuna", "local")
    from ..search.study import search

    with journey.run.lock():
        report = search(journey, plan, make)
    if args.output == "json":
        console.print_json(report)
    else:
        _show(journey, report)
    return 0


def _show(journey: Journey, report: dict[str, Any]) -> None:
    keys = list(report["best"]["parameters"])
    columns = ["trial", report["metric"], *(key.rpartition(".")[2] for key in keys), "seconds"]
    sign = -1 if report["direction"] == "maximize" else 1
    ranked = sorted(
        report["trials"],
        key=lambda trial: (trial["value"] is None, sign * (trial["value"] or 0), trial["number"]),
    )
    console.table(
        f"Trials, the best first ({report['direction']})",
        columns,
        [_row(trial, keys) for trial in ranked],
    )
    folder = journey.run.path
    console.out.print(f"Best recipe:  {folder / report['best_recipe']}", markup=False)
    console.out.print(f"Picture:      {folder / report['picture']}", markup=False)
    console.out.print(
        "The best was chosen by the held-out chats: judge it by others that it has not seen.",
        style="dim",
    )


def _row(trial: dict[str, Any], keys: Sequence[str]) -> list[str]:
    figure = trial["state"] if trial["value"] is None else f"{trial['value']:.5g}"
    return [
        str(trial["number"]),
        figure,
        *(_shown(trial["parameters"].get(key)) for key in keys),
        "" if trial["seconds"] is None else f"{trial['seconds']:.1f}",
    ]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
