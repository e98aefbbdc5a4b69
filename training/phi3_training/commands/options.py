"""The options that several commands share, each defined once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import UsageError
from ..project import DEFAULT_RECIPES, DOCUMENTS_RUN
from ..targets import HERE

# What `ArgumentParser.add_subparsers` returns; argparse has no public name for it.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Command: TypeAlias = Callable[[argparse.Namespace], int]  # what runs; its exit status

SAMPLING = ("temperature", "top_p", "max_new_tokens")  # options that are parameters of a request


def add_command(
    subparsers: Subparsers,
    name: str,
    help_text: str,
    example: str,
    run: Command,
    *,
    own_output: bool = False,
) -> argparse.ArgumentParser:
    """A subcommand with the options that every command has; with `own_output` it defines -o."""
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
    # For cli.main: what runs, and whose usage an unknown option shows.
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
    add_run(parser, "run folder (default: the recipe's name; without a recipe the current run)")
    add_on(parser, "where to run (default: where --run was created, else local)")


def add_run(
    parser: argparse.ArgumentParser,
    help_text: str = "which run (default: the current one, see phi3 use)",
    **more: Any,
) -> None:
    """--run NAME."""
    parser.add_argument("--run", metavar="NAME", help=help_text, **more)


def add_on(parser: argparse.ArgumentParser, help_text: str) -> None:
    """--on local|azure."""
    parser.add_argument("--on", choices=("local", "azure"), help=help_text)


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """--run and --on of the commands that talk to an endpoint."""
    add_run(parser)
    add_on(parser, "only a run there: the current one, else the one connected last")


# A place on Azure: the option, the recipe's key that it sets, and its value.
_PLACE = (
    ("workspace", "workspace_name", "NAME"),
    ("resource-group", "resource_group", "NAME"),
    ("subscription", "subscription_id", "GUID"),
)


def add_place(parser: argparse.ArgumentParser, what_for: str) -> None:
    """--workspace, --resource-group and --subscription: a place on Azure without its runs."""
    for option, key, metavar in _PLACE:
        named = f"azure.{key} on Azure: {what_for}"
        parser.add_argument(f"--{option}", dest=key, metavar=metavar, help=named)


def place_in(args: argparse.Namespace) -> dict[str, str]:
    """The keys of the place that the options name. UsageError where they mean no Azure."""
    place: dict[str, str] = {}
    for option, key, _metavar in _PLACE:
        if value := getattr(args, key):
            if args.on != "azure":
                raise UsageError(f"--{option} is a place on Azure: add --on azure")
            place[key] = value
    return place


def add_rehearse(parser: argparse.ArgumentParser) -> None:
    """--rehearse: the same command on an Azure that runs on this machine."""
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run against a rehearsed Azure on this machine: no account, nothing billed",
    )


def add_replace(parser: argparse.ArgumentParser) -> None:
    """--replace: train over a run that was made from other chats."""
    parser.add_argument(
        "--replace", action="store_true", help="replace a run that was trained on other chats"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """--system, --temperature, --top-p and --max-new-tokens; the defaults are the flow's."""
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default 1)"
    )
    add_max_new_tokens(parser)


def add_max_new_tokens(parser: argparse.ArgumentParser) -> None:
    """--max-new-tokens."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N",
        help="maximum length of the answer (default 256)",
    )  # fmt: skip


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters of a request."""
    return {name: getattr(args, name) for name in SAMPLING}


def add_rag(parser: argparse.ArgumentParser, used_with: str = "--rag") -> None:
    """--rag, and --documents NAME."""
    parser.add_argument(
        "--rag", action="store_true", help="answer from the documents of `phi3 rag index`"
    )
    add_documents(parser, f"with {used_with}: ")


def add_documents(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """--documents NAME: the run that has the index."""
    parser.add_argument(
        "--documents",
        default=DOCUMENTS_RUN,
        metavar="NAME",
        help=f"{prefix}which index, as in `phi3 rag index --run NAME` (default: {DOCUMENTS_RUN})",
    )


def add_top_k(parser: argparse.ArgumentParser, help_text: str, most: int = 50) -> None:
    """-k: how many passages."""
    parser.add_argument(
        "-k", "--top-k", type=number(1, most), default=4, metavar="COUNT",
        help=f"{help_text} (default 4)",
    )  # fmt: skip


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """--host and --port."""
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1")
    parser.add_argument("--port", type=int, default=port, help=f"default {port}")


def add_out_folder(parser: argparse.ArgumentParser) -> None:
    """--out FOLDER of what is packed."""
    parser.add_argument(
        "--out", type=Path, default=Path("dist"), metavar="FOLDER",
        help="output folder (default: dist)",
    )  # fmt: skip


def add_no_browser(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """--no-browser."""
    parser.add_argument(
        "--no-browser", action="store_true", help=f"{prefix}only print the page's address"
    )


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `least` to `most`."""
    wanted = f"from {least} to {most}" if most is not None else f"of {least} or more"

    def parse(text: str) -> int:
        # isascii: int() also takes the digits of other scripts.
        is_number = text.isascii() and text.isdigit()
        if not is_number or not least <= int(text) <= (int(text) if most is None else most):
            raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text!r}")
        return int(text)

    return parse
