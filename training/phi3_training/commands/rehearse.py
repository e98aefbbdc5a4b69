"""`--rehearse`: the same command inside a rehearsed Azure on this machine.

Writes everything under <runs>/rehearsal, so that neither real runs nor the user's own Prompt flow
store see it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import console
from ..errors import MissingExtraError
from .common import find

RECIPE = Path("training/recipes/phi3-tiny-azure.yaml")


def run_rehearsed(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run `argv` without its --rehearse; the exit status of what ran inside."""
    home = args.runs.resolve() / "rehearsal"
    # Outside of the folder that the rehearsed Azure keeps its own state in.
    os.environ["PF_HOME_DIRECTORY"] = str(home / "promptflow")
    inner = [sys.executable, "-m", "phi3_training.cli", *inner_words(args, argv, home / "runs")]
    command = rehearsal_command("run", azure_folder(args.runs), "--", *inner)
    status = _wait(subprocess.Popen(command))  # noqa: S603 - our own commands, no shell
    if args.output == "text":
        console.err.print(
            "Rehearsed on this machine; it has not yet run against live Azure. Add --rehearse to "
            "the next command too; end it with: phi3 rehearse stop",
            markup=False,
        )
    return status


def azure_folder(runs: Path) -> Path:
    """Where the rehearsed Azure of a runs folder keeps its state."""
    return runs.resolve() / "rehearsal" / "azure"


def rehearsal_command(action: str, folder: Path, *words: str) -> list[str]:
    """`python -m phi3_rehearsal ACTION FOLDER …`. Raises MissingExtraError.

    A process, not an import: the product must not know what it is rehearsed with.
    """
    if importlib.util.find_spec("trustme") is None:
        raise MissingExtraError("trustme", "rehearsal")
    return [sys.executable, "-m", "phi3_rehearsal", action, str(folder), *words]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status. Ctrl-C at a terminal reaches the child by itself; a signal does not."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                process.send_signal(signal.SIGINT)


def inner_words(args: argparse.Namespace, argv: Sequence[str], runs: Path) -> list[str]:
    """The command line inside: on Azure, in run folders of its own, the tiny recipe if none."""
    words = _without_own(argv)
    words += ["--runs", str(runs)]
    if args.on is None and not _names_run(args):
        words += ["--on", "azure"]
    named = any("=" not in word for word in getattr(args, "words", ()))
    if hasattr(args, "words") and not named and not args.run:
        place = 2 if words[0] == "azure" else 1  # behind the command, and its own
        words.insert(place, str(find(RECIPE).resolve()))
    return words


def _names_run(args: argparse.Namespace) -> bool:
    return bool(args.run or getattr(args, "named", None))


def _without_own(argv: Sequence[str]) -> list[str]:
    """Without --rehearse, in any length that argparse takes, and without --runs FOLDER."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word == "--runs":
            skip = True
        elif not (word.startswith("--runs=") or word in _SPELLINGS):
            kept.append(word)
    return kept


_SPELLINGS = {"--rehearse"[:length] for length in range(len("--re"), len("--rehearse") + 1)}
