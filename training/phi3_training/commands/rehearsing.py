"""`phi3 rehearse start | stop | status | env | calls | fault`: the rehearsed Azure by itself.

Its state lies under <runs>/rehearsal/azure, where `--rehearse` looks for it as well.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from collections.abc import Callable
from typing import Any

from .. import console
from ..errors import StageError, UsageError
from .common import add_command
from .rehearse import azure_folder, rehearsal_command

_SHOWN = 20
_USAGE = 2  # the exit status of a program that was asked wrongly


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    parser = subparsers.add_parser("rehearse", help="run an Azure of your own, on this machine")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, example: str, run: Callable[..., int]) -> Any:
        return add_command(actions, name, text, f"phi3 rehearse {example}", run)

    start = add("start", "start the rehearsed Azure", "start", run_start)
    start.add_argument(
        "--fault", action="append", default=[], metavar="FAULT", help="inject a fault (repeatable)"
    )
    stop = add("stop", "stop it, with the jobs and servers it runs", "stop", run_stop)
    stop.add_argument("--forget", action="store_true", help="also delete its state")
    add("status", "say whether it runs and what it holds", "status", run_status)
    add("env", "print the variables that lead the Azure SDKs to it", 'env  # eval "$(…)"', run_env)
    calls = add("calls", "show the calls that it answered", "calls -n 50", run_calls)
    calls.add_argument("-n", type=int, default=_SHOWN, metavar="COUNT", help=f"how many ({_SHOWN})")
    fault = add(
        "fault",
        "inject a fault: METHOD PATH KIND [name=value …]",
        "fault 'PUT */onlineEndpoints/* 429 retry-after=1 times=2'",
        run_fault,
    )
    fault.add_argument("fault", nargs="?", metavar="FAULT", help="none: list the pending ones")
    fault.add_argument("--clear", action="store_true", help="drop all pending faults")


def run_start(args: argparse.Namespace) -> int:
    """Start it, or find the one that runs."""
    faults = [f"--fault={fault}" for fault in args.fault]
    return _shown(args, _ask(args, "start", *faults))


def run_stop(args: argparse.Namespace) -> int:
    """Stop it."""
    done = _ask(args, "stop", *(["--forget"] if args.forget else []))
    if args.output == "json":
        return _shown(args, done)
    said = "The rehearsed Azure is stopped" if done["stopped"] else "No rehearsed Azure runs"
    kept = " and its state is deleted" if args.forget else f"; its state is in {done['folder']}"
    _line(said + kept)
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Whether it runs, and its resources by type."""
    return _shown(args, _ask(args, "status"))


def run_env(args: argparse.Namespace) -> int:
    """The variables, for a shell."""
    environment = _ask(args, "env")
    if args.output == "json":
        console.print_json(environment)
        return 0
    for name, value in environment.items():
        _line(f"export {name}={shlex.quote(value)}")
    return 0


def run_calls(args: argparse.Namespace) -> int:
    """The journal's last calls."""
    calls = _ask(args, "calls", "-n", str(args.n))
    if args.output == "json":
        console.print_json(calls)
        return 0
    for call in calls:
        _line(f"{call['status']} {call['method']} {call['host']}{call['path']}")
    return 0


def run_fault(args: argparse.Namespace) -> int:
    """Inject a fault, or list the pending ones."""
    words = ["--clear"] if args.clear else []
    pending = _ask(args, "fault", *words, *([args.fault] if args.fault else []))
    if args.output == "json":
        console.print_json(pending)
        return 0
    for text in pending or ["No injected faults are pending."]:
        _line(text)
    return 0


def _ask(args: argparse.Namespace, action: str, *words: str) -> Any:
    """What the rehearsal's own program answers. Raises UsageError or StageError in its words."""
    command = rehearsal_command(action, azure_folder(args.runs), *words)
    done = subprocess.run(  # noqa: S603 - our own program, no shell
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        text = done.stderr.strip() or f"The rehearsal ended with exit status {done.returncode}"
        raise UsageError(text) if done.returncode == _USAGE else StageError(text)
    return json.loads(done.stdout)


def _line(text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True, highlight=False)


def _shown(args: argparse.Namespace, value: dict[str, Any]) -> int:
    if args.output == "json":
        console.print_json(value)
        return 0
    for name, item in value.items():
        text = ", ".join(f"{n} {k}" for k, n in item.items()) if isinstance(item, dict) else item
        _line(f"{name:<10} {text}")
    return 0
