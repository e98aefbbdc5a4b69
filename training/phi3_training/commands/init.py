"""`phi3 init`: a project of one's own, from the files that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import console
from ..project import copy_project
from .common import add_command


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "init",
        "write a project of your own: flow, recipe, sample chats, connection templates",
        "phi3 init my-phi3",
        run_init,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")


def run_init(args: argparse.Namespace) -> int:
    """Write the project and say what to do with it."""
    written = copy_project(args.folder)
    if args.output == "json":
        console.print_json({"folder": str(args.folder), "written": [str(path) for path in written]})
        return 0
    console.out.print(f"Written into {args.folder}: {', '.join(map(str, written))}", markup=False)
    console.out.print(f"Next: cd {args.folder} && phi3 up recipe.yaml", markup=False)
    return 0
