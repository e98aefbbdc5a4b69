"""`--rehearse`: the same command inside a rehearsed Azure on this machine.

Writes everything under <runs>/rehearsal, so that neither real runs nor the user's own Prompt flow
store see it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .. import console
from ..errors import MissingExtraError
from ..project import find

RECIPE = Path("training/recipes/phi3-tiny-azure.yaml")


def run_rehearsed(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run `argv` without its --rehearse; the exit status of what ran inside."""
    try:
        from ..rehearsal import run_inside
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "cryptography", "azure") from None
    home = args.runs.resolve() / "rehearsal"
    # Outside of the folder that the rehearsed Azure keeps its own state in.
    os.environ["PF_HOME_DIRECTORY"] = str(home / "promptflow")
    status = run_inside(inner_words(args, argv, home / "runs"), home / "azure")
    if args.output == "text":
        console.err.print(
            "Rehearsed on this machine; it has not yet run against live Azure. Add --rehearse to "
            "the next command too; end it with: phi3 rehearse stop",
            markup=False,
        )
    return int(status)


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
