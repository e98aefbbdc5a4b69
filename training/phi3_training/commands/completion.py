"""`phi3 completion SHELL`: what bash, zsh or fish needs to complete commands, options, run names.

argcomplete writes the shell's part; on a Tab the shell calls `phi3` with COMP_LINE set to the line
typed so far, and `complete` answers it from the parser that parses the command as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from ..errors import MissingExtraError
from . import HELP
from .options import Subparsers, add_command

SHELLS = ("bash", "zsh", "fish")


def register_completion(subparsers: Subparsers) -> None:
    """Add the command of this module."""
    example = 'eval "$(phi3 completion bash)"'
    parser = add_command(
        subparsers, "completion", HELP["completion"], example, run_completion, own_output=True
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read it")


def run_completion(args: argparse.Namespace) -> int:
    """Print the shell's part, for `eval` or a file."""
    try:
        from argcomplete.shell_integration import shellcode
    except ImportError:
        raise MissingExtraError("argcomplete", "flow,local") from None
    sys.stdout.write(shellcode(["phi3"], shell=args.shell))
    return 0


def complete(parser: argparse.ArgumentParser, add_commands: Callable[[str], None]) -> None:
    """Answer the shell, and end this process; `add_commands` takes the command typed so far."""
    from argcomplete import autocomplete

    words = os.environ.get("COMP_LINE", "").split()
    add_commands(words[1] if len(words) > 1 else "")
    _offer_runs(parser)
    autocomplete(parser, exit_method=sys.exit)


def _offer_runs(parser: argparse.ArgumentParser) -> None:
    """The names of the runs wherever one is asked for."""
    from ..runs import all_runs

    def run_names(parsed_args: argparse.Namespace, **_more: object) -> list[str]:
        return [run.name for run in all_runs(parsed_args.runs)]

    for action in parser._actions:
        # argparse has no public way to its options; argcomplete reads the same attributes.
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                _offer_runs(each)
        elif action.metavar in ("RUN", "NAME") and action.dest in ("run", "named"):
            action.completer = run_names  # type: ignore[attr-defined]  # argcomplete looks for it
