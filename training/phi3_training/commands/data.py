"""`phi3 data check | fix | convert | prepare | show`: chats before anything is trained on them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .. import console
from ..errors import UsageError
from ..journey import go
from ..manifests import BaseManifest, DatasetManifest
from ..run import write_atomically
from ..runs import all_runs
from ..stages import stages_until
from . import HELP
from .common import journey_of, recipe_of
from .options import Subparsers, add_command, add_recipe, add_replace, number

if TYPE_CHECKING:
    from ..data.check import Stretch

SOURCE_HELP = (
    "a .jsonl, .json, .csv, .parquet or .arrow file (text also as .gz), a folder of such files, "
    "or hub:NAME:SPLIT"
)


def register_data(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("data", help=HELP["data"])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = add_command(
        actions, "check", "report every fault in the chats", "phi3 data check a.jsonl", run_check
    )
    check.add_argument(
        "files",
        nargs="+",
        metavar="SOURCE",
        help=f"{SOURCE_HELP}; or a recipe (.yaml), with key=value, whose chats are checked by its "
        "own data: keys and the tokenizer of its model",
    )
    check.add_argument("--report", type=Path, metavar="FILE", help="write every fault to this file")
    _add_model(check, "count tokens with this model folder's tokenizer")
    prepare = add_command(
        actions, "prepare", "check, split and copy the chats into the run", "phi3 data prepare",
        run_prepare,
    )  # fmt: skip
    add_recipe(prepare)
    add_replace(prepare)
    fix = add_command(
        actions, "fix", "write a repaired copy of chats, and list every change",
        "phi3 data fix chats.jsonl -o fixed.jsonl", run_fix, own_output=True,
    )  # fmt: skip
    _add_out(fix)
    fix.add_argument("--report", type=Path, metavar="FILE", help="write every change to this file")
    convert = add_command(
        actions, "convert", "write chats of any format as messages, otherwise unchanged",
        "phi3 data convert chats.csv -o chats.jsonl", run_convert, own_output=True,
    )  # fmt: skip
    _add_out(convert)
    convert.add_argument(
        "--to",
        choices=("messages", "openai"),
        default="messages",
        help="messages (default), or the chat form of OpenAI's fine-tuning",
    )
    show = add_command(
        actions, "show", "print conversations", "phi3 data show a.jsonl -n 3 --tokens", run_show
    )
    show.add_argument("file", metavar="SOURCE", help=SOURCE_HELP)
    show.add_argument(
        "-n", type=number(0), default=5, metavar="COUNT", help="how many (default: 5)"
    )
    show.add_argument(
        "--tokens",
        action="store_true",
        help="show the exact training text, with the trained tokens marked",
    )
    _add_model(show, "whose tokenizer (default: the base model of the most recent run)")


def _add_model(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--model", type=Path, metavar="FOLDER", help=help_text)


def run_check(args: argparse.Namespace) -> int:
    """Check sources; exit 1 with all faults when there are any."""
    from ..data import check, check_recipe
    from ..finetune.rows import TokenRules, chat_of
    from ..memory.rows import tokenizer_folder
    from ..recipe import DataSection

    # A recipe knows more than its files: data.bad_rows, data.max_length, the model's tokenizer.
    if args.files[0].endswith((".yaml", ".yml")):
        recipe = recipe_of(args.files)
        folder = args.model or tokenizer_folder(recipe, None)
        rules = TokenRules.of(recipe, folder) if folder is not None else None
        if rules is None:
            console.note(
                f"The tokenizer of {recipe.model.name_or_path} is not on this machine yet, so no "
                "row is compared with data.max_length (--model FOLDER names one)."
            )
        report = check_recipe(recipe.data, rules, folder)
    else:
        rules = None
        if args.model:
            rules = TokenRules(
                chat_of(args.model), DataSection(train=[Path(file) for file in args.files])
            )
        report = check(args.files, args.model, rules=rules)
    if args.report:
        write_atomically(args.report, report.every_line())
    console.show(args.output, report.as_dict(), *report.lines())
    return 1 if report.faults else 0


class _Out(argparse.Action):
    """-o FILE names the file to write; -o text and -o json are what they are everywhere else."""

    def __call__(self, _parser: Any, namespace: Any, values: Any, _option: Any = None) -> None:
        if values in ("text", "json"):
            namespace.output = values
        else:
            namespace.out = Path(values)


def _add_out(parser: argparse.ArgumentParser) -> None:
    """The sources to read, the file to write, and --force over an existing one."""
    parser.add_argument("files", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument(
        "-o",
        "--output",
        "--out",
        action=_Out,
        default="text",
        metavar="OUT",
        help="the .jsonl file to write; a second -o json prints the report as JSON",
    )
    parser.set_defaults(out=None)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _out_of(args: argparse.Namespace) -> Path:
    if args.out is None:
        raise UsageError("Name the file to write: -o OUT.jsonl")
    out: Path = args.out
    return out


def run_fix(args: argparse.Namespace) -> int:
    """Repair a copy."""
    from ..data.repair import fix

    report = fix(args.files, _out_of(args), force=args.force)
    if args.report:
        write_atomically(args.report, report.every_line())
    lines = [*report.lines(), *([f"Every change: {args.report}"] if args.report else [])]
    last = f"Next: phi3 data check {report.out}"
    return console.show(args.output, report.as_dict(), *lines, last)


def run_convert(args: argparse.Namespace) -> int:
    """Write another form."""
    from ..data.repair import convert

    report = convert(args.files, _out_of(args), args.to, force=args.force)
    return console.show(args.output, report.as_dict(), *report.lines())


def run_prepare(args: argparse.Namespace) -> int:
    """Do the first stage alone."""
    journey = journey_of(args)
    with journey.run.lock():
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages_until(DatasetManifest, in_cloud=journey.in_cloud))
    manifest = journey.run.require(DatasetManifest)
    if args.output == "json":
        console.print_json(manifest.as_json())
    elif manifest.tokens:
        console.note(str(manifest.tokens))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print the first conversations of a source."""
    from ..data import show

    shown = show(args.file, args.n)
    if args.tokens:
        from ..data.check import TokenViewer

        folder = args.model
        if folder is None:  # the base model of the run that was worked on last
            for run in all_runs(args.runs):
                manifest = run.read(BaseManifest)
                base = run.path / manifest.path if manifest else run.path
                if (base / "tokenizer.json").is_file():
                    folder = base
                    break
        if folder is None:
            raise UsageError(
                f"No run under {args.runs} has a model yet; name the folder of one with --model "
                "FOLDER"
            )
        viewer = TokenViewer(folder)
        views = [viewer.view(conversation) for conversation in shown]
        if args.output == "json":
            console.print_json([view.as_dict() for view in views])
            return 0
        # In a pipe or a file, and for NO_COLOR: brackets instead of colours.
        plain = console.out.color_system is None or console.out.no_color
        how = "in ⟦ ⟧" if plain else "in green"
        console.line(f"trained tokens are {how}; the rest is context", "dim")
        for view in views:
            counted = f"{view.trained} of {len(view.ids)} tokens are trained on"
            console.line(f"{view.place}: {counted}", "dim")
            console.out.print(coloured(view.stretches, marked=plain))
        return 0
    if args.output == "json":
        console.print_json([conversation.to_dict() for conversation in shown])
        return 0
    for conversation in shown:
        place = f"{conversation.source.name}:{conversation.line}"
        console.line(place, "dim")
        for message in conversation.messages:
            role = message.role if message.learn else f"{message.role} (not learnt)"
            console.line(f"  {role}: {message.content}")
    return 0


def coloured(stretches: Sequence[Stretch], *, marked: bool) -> Text:
    """Training text with trained tokens in green, or `marked` if there are no colours."""
    text = Text()
    for stretch in stretches:
        learnt = f"⟦{stretch.text}⟧" if marked else stretch.text
        text.append(learnt if stretch.trained else stretch.text, "green" if stretch.trained else "")
    return text
