"""`phi3 lint`: names what will not run any more in a tutorial's or a user's files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import console
from . import HELP
from .common import add_command


def register_lint(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(subparsers, "lint", HELP["lint"], "phi3 lint my-tutorial", run_lint)
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="FILE | FOLDER",
        help="YAML, notebook, Markdown or Python, or folders with such files",
    )


def run_lint(args: argparse.Namespace) -> int:
    """Show each place with its cure; exit 1 when there is one."""
    from ..lint import files_in, lint

    files = files_in(args.paths)
    found = lint(files)
    if args.output == "json":
        console.print_json(
            {"ok": not found, "files": len(files), "findings": [each.as_dict() for each in found]}
        )
        return 1 if found else 0
    for each in found:
        console.out.print(str(each), markup=False)
    places = f"{len(found)} place{'' if len(found) == 1 else 's'}"
    said = f"{places} will not run any more or show a key" if found else "Nothing dead was found"
    counted = f"{len(files)} file{'' if len(files) == 1 else 's'} read"
    console.out.print(f"{said}; {counted}", markup=False)
    return 1 if found else 0
