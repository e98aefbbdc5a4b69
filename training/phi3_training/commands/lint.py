"""`phi3 lint`: names what no longer runs in a tutorial's or a user's files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import console
from . import HELP
from .options import add_command


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
    """Show each place with its fix; exit 1 when there is one."""
    from ..lint import files_in, lint

    files = files_in(args.paths)
    findings = lint(files)
    places = f"{len(findings)} place{'' if len(findings) == 1 else 's'}"
    result = f"{places} to fix" if findings else "Nothing outdated was found"
    console.show(
        args.output,
        {
            "ok": not findings,
            "files": len(files),
            "findings": [finding.as_dict() for finding in findings],
        },
        *map(str, findings),
        f"{result}; {len(files)} file{'' if len(files) == 1 else 's'} read",
    )
    return 1 if findings else 0
