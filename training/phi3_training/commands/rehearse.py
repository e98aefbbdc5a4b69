"""`phi3 rehearse start | stop | status | env | clock | calls | fault`, and `phi3 … --rehearse`.

The rehearsed Azure is a separate program, `python -m phi3_rehearsal`, which this module starts and
whose JSON it reads: phi3 must not know what it is rehearsed with. All of it is under
<runs>/rehearsal, so that neither real runs nor the user's own Prompt flow store see it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import console
from ..errors import MissingExtraError, StageError, UsageError
from ..project import find
from . import HELP
from .options import Command, Subparsers, add_command

RECIPE = Path("training/recipes/phi3-tiny-azure.yaml")
_CALLS_SHOWN = 20
_USAGE = 2  # the exit status of a usage error


def azure_folder(runs: Path) -> Path:
    """Where the rehearsed Azure of a runs folder stores its state."""
    return runs.resolve() / "rehearsal" / "azure"


def _command(action: str, runs: Path, *words: str) -> list[str]:
    """`python -m phi3_rehearsal ACTION FOLDER …`. Raises MissingExtraError."""
    if importlib.util.find_spec("trustme") is None:
        raise MissingExtraError("trustme", "rehearsal")
    return [sys.executable, "-m", "phi3_rehearsal", action, str(azure_folder(runs)), *words]


def run_rehearsed(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run `argv` without its --rehearse; the exit status of what ran inside."""
    home = args.runs.resolve() / "rehearsal"
    # Outside the folder with the rehearsed Azure's own state.
    os.environ["PF_HOME_DIRECTORY"] = str(home / "promptflow")
    inner = [sys.executable, "-m", "phi3_training.cli", *inner_words(args, argv, home / "runs")]
    # The rehearsal starts it: it sets the proxy, the CA and the sign-in that lead the SDKs to it.
    command = _command("run", args.runs, "--", *inner)
    status = None
    with subprocess.Popen(command) as process:  # noqa: S603 - our own commands, no shell
        while status is None:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                # A terminal sends Ctrl-C to the child as well; a signal reaches this process alone.
                if not sys.stdin.isatty():
                    process.send_signal(signal.SIGINT)
    if args.output == "text":
        console.err.print(
            "Rehearsed on this machine; not yet run against live Azure. Add --rehearse to the "
            "next command too; stop the rehearsal with: phi3 rehearse stop",
            markup=False,
        )
    return status


def inner_words(args: argparse.Namespace, argv: Sequence[str], runs: Path) -> list[str]:
    """The command line inside: on Azure, in its own run folders, the tiny recipe if none."""
    # argparse takes the two out of the words, in whatever form they were typed.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--rehearse", action="store_true")
    own.add_argument("--runs")
    words = [*own.parse_known_args(argv)[1], "--runs", str(runs)]
    if args.on is None and not args.run and not getattr(args, "named", None):
        words += ["--on", "azure"]
    named = any("=" not in word for word in getattr(args, "words", ()))
    if hasattr(args, "words") and not named and not args.run:
        place = 2 if words[0] == "azure" else 1  # after the command, and the command of `azure`
        words.insert(place, str(find(RECIPE).resolve()))
    return words


def register_rehearse(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("rehearse", help=HELP["rehearse"])
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, example: str, run: Command) -> argparse.ArgumentParser:
        return add_command(actions, name, text, f"phi3 rehearse {example}", run)

    start = add("start", "start the rehearsed Azure", "start", run_start)
    start.add_argument(
        "--fault", action="append", default=[], metavar="FAULT", help="inject a fault (repeatable)"
    )
    stop = add("stop", "stop the rehearsal, its jobs and its servers", "stop", run_stop)
    stop.add_argument("--forget", action="store_true", help="also delete its state")
    add("status", "show whether it is running and what it contains", "status", run_status)
    add(
        "env", "print the variables that direct the Azure SDKs to it", 'env  # eval "$(…)"', run_env
    )
    clock = add(
        "clock",
        "show its clock or move it forward; what is due by then runs",
        "clock 9h",
        run_clock,
    )
    clock.add_argument("by", nargs="?", default="0m", metavar="DURATION", help="30m, 9h, 2d")
    calls = add("calls", "show the calls it answered", "calls -n 50", run_calls)
    calls.add_argument(
        "-n",
        type=int,
        default=_CALLS_SHOWN,
        metavar="COUNT",
        help=f"how many (default: {_CALLS_SHOWN})",
    )
    fault = add(
        "fault",
        "inject a fault: METHOD PATH KIND [name=value …]",
        "fault 'PUT */onlineEndpoints/* 429 retry-after=1 times=2'",
        run_fault,
    )
    fault.add_argument(
        "fault", nargs="?", metavar="FAULT", help="without it, list the pending faults"
    )
    fault.add_argument("--clear", action="store_true", help="clear all pending faults")


def run_start(args: argparse.Namespace) -> int:
    """Start it, or find the one that runs."""
    faults = [f"--fault={fault}" for fault in args.fault]
    return _show_state(args, _ask(args, "start", *faults))


def run_stop(args: argparse.Namespace) -> int:
    """Stop it."""
    done = _ask(args, "stop", *(["--forget"] if args.forget else []))
    text = "The rehearsed Azure is stopped" if done["stopped"] else "No rehearsed Azure is running"
    state = " and its state is deleted" if args.forget else f"; its state is in {done['folder']}"
    return console.show(args.output, done, text + state)


def run_status(args: argparse.Namespace) -> int:
    """Whether it runs, and its resources by type."""
    return _show_state(args, _ask(args, "status"))


def run_env(args: argparse.Namespace) -> int:
    """The variables, for a shell."""
    environment = _ask(args, "env")
    lines = (f"export {name}={shlex.quote(value)}" for name, value in environment.items())
    return console.show(args.output, environment, *lines)


def run_clock(args: argparse.Namespace) -> int:
    """Move its clock, and say which workflows ran."""
    done = _ask(args, "clock", args.by)
    runs = (f"{run['time']} {run['workflow']}: {run['status']}" for run in done["runs"])
    return console.show(args.output, done, f"{done['time']} by the rehearsal's clock", *runs)


def run_calls(args: argparse.Namespace) -> int:
    """The journal's last calls."""
    calls = _ask(args, "calls", "-n", str(args.n))
    lines = (f"{c['status']} {c['method']} {c['host']}{c['path']}" for c in calls)
    return console.show(args.output, calls, *lines)


def run_fault(args: argparse.Namespace) -> int:
    """Inject a fault, or list the pending ones."""
    words = ["--clear"] if args.clear else []
    pending = _ask(args, "fault", *words, *([args.fault] if args.fault else []))
    return console.show(args.output, pending, *(pending or ["No injected faults are pending."]))


def _ask(args: argparse.Namespace, action: str, *words: str) -> Any:
    """What the rehearsal's own program answers. Raises UsageError or StageError in its words."""
    command = _command(action, args.runs, *words)
    done = subprocess.run(  # noqa: S603 - our own program, no shell
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        text = done.stderr.strip() or f"The rehearsal ended with exit status {done.returncode}"
        raise UsageError(text) if done.returncode == _USAGE else StageError(text)
    return json.loads(done.stdout)


def _show_state(args: argparse.Namespace, state: dict[str, Any]) -> int:
    lines = []
    for name, item in state.items():
        text = ", ".join(f"{n} {k}" for k, n in item.items()) if isinstance(item, dict) else item
        lines.append(f"{name:<10} {text}")
    return console.show(args.output, state, *lines)
