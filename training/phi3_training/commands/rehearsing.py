"""`phi3 rehearse start | stop | status | env | calls | fault`: the rehearsed Azure by itself.

Its state lies under <runs>/rehearsal/azure, where `--rehearse` looks for it as well.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import console
from ..errors import MissingExtraError, UsageError
from .common import add_command

if TYPE_CHECKING:
    from ..rehearsal import Rehearsal

_SHOWN = 20


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
    stop.add_argument("--forget", action="store_true", help="also delete all that it knows")
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
    fault.add_argument("fault", nargs="?", metavar="FAULT", help="none: list those to come")
    fault.add_argument("--clear", action="store_true", help="forget all faults")


def run_start(args: argparse.Namespace) -> int:
    """Start it, or find the one that runs."""
    rehearsal = _module().start(_folder(args), faults=args.fault)
    return _shown(args, _about(rehearsal))


def run_stop(args: argparse.Namespace) -> int:
    """Stop it."""
    module, folder = _module(), _folder(args)
    stopped = module.stop(folder)
    if args.forget:
        shutil.rmtree(folder, ignore_errors=True)
    if args.output == "json":
        told = {"stopped": stopped, "forgotten": bool(args.forget), "folder": str(folder)}
        return _shown(args, told)
    said = "The rehearsed Azure is stopped" if stopped else "No rehearsed Azure runs"
    kept = "and all that it knew is deleted" if args.forget else f"; what it knows is in {folder}"
    console.out.print(f"{said}{' ' if args.forget else ''}{kept}", markup=False, soft_wrap=True)
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Whether it runs, and its resources by type."""
    module, folder = _module(), _folder(args)
    found = module.find(folder)
    about = _about(found) if found else {"state": "stopped", "folder": str(folder)}
    return _shown(args, {**about, "resources": module.held(folder)})


def run_env(args: argparse.Namespace) -> int:
    """The variables, for a shell."""
    environment = _running(args).env
    if args.output == "json":
        console.print_json(environment)
        return 0
    for name, value in environment.items():
        console.out.print(
            f"export {name}={shlex.quote(value)}", markup=False, soft_wrap=True, highlight=False
        )
    return 0


def run_calls(args: argparse.Namespace) -> int:
    """The journal's last calls."""
    from ..rehearsal.inside import describe

    found = _module().calls(_folder(args))[-args.n :]
    if args.output == "json":
        console.print_json(found)
        return 0
    for call in found:
        console.out.print(describe(call), markup=False, soft_wrap=True, highlight=False)
    return 0


def run_fault(args: argparse.Namespace) -> int:
    """Inject a fault, or list those that are still to happen."""
    from ..rehearsal.faults import Faults

    faults = Faults(_folder(args) / "faults.json")
    if args.clear:
        faults.clear()
    if args.fault:
        _folder(args).mkdir(parents=True, exist_ok=True)
        faults.add(args.fault)
    listed = [fault.shown() for fault in faults.all()]
    if args.output == "json":
        console.print_json(listed)
    else:
        for text in listed or ["No faults are to come."]:
            console.out.print(text, markup=False, soft_wrap=True, highlight=False)
    return 0


def _folder(args: argparse.Namespace) -> Path:
    folder: Path = _module().folder_of(args.runs)
    return folder


def _module() -> Any:
    try:
        from .. import rehearsal
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "cryptography", "azure") from None
    return rehearsal


def _running(args: argparse.Namespace) -> Rehearsal:
    found: Rehearsal | None = _module().find(_folder(args))
    if found is None:
        raise UsageError("No rehearsed Azure runs here; start it with: phi3 rehearse start")
    return found


def _about(rehearsal: Rehearsal) -> dict[str, Any]:
    return {
        "state": "running",
        "folder": str(rehearsal.folder),
        "proxy": rehearsal.url,
        "ca_file": str(rehearsal.ca_file),
        "pid": rehearsal.pid,
    }


def _shown(args: argparse.Namespace, value: dict[str, Any]) -> int:
    if args.output == "json":
        console.print_json(value)
        return 0
    for name, item in value.items():
        text = ", ".join(f"{n} {k}" for k, n in item.items()) if isinstance(item, dict) else item
        console.out.print(f"{name:<10} {text}", markup=False, soft_wrap=True, highlight=False)
    return 0
