"""`phi3`: parses the command line, calls a command, turns errors into one clear block.

Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from phi3_tool import __version__
from phi3_tool.errors import ConfigurationError, Phi3Error

from .commands import GROUPS
from .errors import Phi3TrainingError, UsageError, did_you_mean

EXAMPLES = """\
examples:
  phi3 up                                   fine-tune a small model, serve it, ask it
  phi3 up my.yaml data.train=my_chats.jsonl another recipe, one key changed
  phi3 chat                                 talk to the tuned model
  phi3 runs                                 list the runs; `phi3 use RUN` chooses the current one
  phi3 down                                 stop what `up` started
  phi3 up --on azure --rehearse             the same on a rehearsed Azure, on this machine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    typed = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog="phi3",
        description="Fine-tune Phi-3 on your own chats and talk to it in Prompt flow.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phi3-promptflow {__version__}")
    try:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow, see `phi3 completion`
            from .commands.completion import complete

            complete(parser, lambda wanted: _add_commands(parser, wanted))
        _add_commands(parser, typed[0] if typed else "")
        from .console import print_error
    except ImportError as error:
        package = error.name or "a package"
        sys.stderr.write(
            f"Error: phi3 needs {package}, which is not installed. "
            'Install it with: pip install "phi3-promptflow[flow,local]"\n'
        )
        return 1
    # The unknown are looked at below: argparse takes `recipe key=value` in one group only, before
    # or after the options, and people write them on both sides.
    args, rest = parser.parse_known_args(typed)
    if rest and (not hasattr(args, "words") or any(word.startswith("-") for word in rest)):
        used = getattr(args, "parser", parser)  # whose options are the known ones
        used.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words += rest
    if args.command is None:
        parser.print_help()
        return 2
    try:
        if getattr(args, "rehearse", False):
            from .commands.rehearse import run_rehearsed

            return run_rehearsed(args, typed)
        run: Callable[[argparse.Namespace], int] = args.run_command
        return run(args)
    except (Phi3TrainingError, Phi3Error) as error:
        if args.debug:
            raise
        print_error(str(error))
        return 2 if isinstance(error, (UsageError, ConfigurationError)) else 1
    except KeyboardInterrupt:
        print_error("Interrupted. Finished work is saved; resume with the same command.")
        return 130
    except BrokenPipeError:  # e.g. `phi3 status | head`; closed, else Python complains at its exit
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        if args.debug:
            raise
        print_error(
            f"{error}. Free disk space or fix the permissions, then run the same command again."
        )
        return 1


class Parser(argparse.ArgumentParser):
    """The same, with the closest known word in the error for a mistyped command or option."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message; exit 2."""
        if wrong := re.match(r"(.*)invalid choice: '(.*)' \(choose from (.*)\)", message):
            place, typed, known = wrong.groups()
            close = did_you_mean(typed, re.findall(r"[\w-]+", known))
            if place.startswith("argument COMMAND"):  # --help lists them with what they do
                message = f"there is no command {typed!r}{close or ';'} All commands: phi3 --help"
            else:
                message += close
        elif wrong := re.match(r"unrecognized arguments: (-[\w-]+)", message):
            message += did_you_mean(wrong[1], self._option_string_actions)
        super().error(message)


def _add_commands(parser: argparse.ArgumentParser, wanted: str) -> None:
    """All commands by name; options only for `wanted`, so that no other module is loaded."""
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for group in GROUPS:
        if wanted in group.commands:
            module = importlib.import_module(f"phi3_training.commands.{group.module}")
            getattr(module, group.register)(subparsers)
        else:
            for name, text in group.commands.items():
                subparsers.add_parser(name, help=text)


if __name__ == "__main__":
    sys.exit(main())
