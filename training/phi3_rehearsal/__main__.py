"""`python -m phi3_rehearsal ACTION FOLDER …`: the rehearsed Azure whose state is in FOLDER.

Each action prints one JSON value; what goes wrong is one line on standard error, with exit status 2
for what was asked wrongly and 1 for the rest. `run` prints what its command prints.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from . import control
from .cloud import Cloud
from .faults import Faults
from .processes import RehearsalError, UsageError, stop_server_of

_NOT_RUNNING = "No rehearsed Azure is running here; start it with: phi3 rehearse start"
_CLOCK_SECONDS = 5.0  # between two looks at what workflows are due


def main(argv: Sequence[str] | None = None) -> int:
    """Do one action; its exit status."""
    args = _parser().parse_args(argv)
    try:
        return _act(args)
    except RehearsalError as error:
        sys.stderr.write(f"{error}\n")
        # 2 as argparse itself ends where a command line is wrong.
        return 2 if isinstance(error, UsageError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m phi3_rehearsal", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("folder", type=Path, metavar="FOLDER")
        return added

    start = add("start", "start it, or use the one that is running")
    start.add_argument("--fault", action="append", default=[], metavar="FAULT")
    stop = add("stop", "stop it and its jobs and servers")
    stop.add_argument("--forget", action="store_true", help="also delete its folder")
    add("status", "show whether it is running, and how many resources of each type it has")
    add("env", "print the variables that point the Azure SDKs to it")
    clock = add("clock", "show its clock, or move it forward")
    clock.add_argument("by", nargs="?", default="0m", metavar="DURATION", help="30m, 9h, 2d")
    calls = add("calls", "list the calls it answered, oldest first")
    calls.add_argument("-n", type=int, default=20, metavar="COUNT", help="the last COUNT (20)")
    fault = add("fault", "inject a fault and list the pending ones")
    fault.add_argument("fault", nargs="?", metavar="FAULT")
    fault.add_argument("--clear", action="store_true", help="clear all pending faults first")
    run = add("run", "run COMMAND with these variables and show the calls it makes")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    serve = add("serve", "serve until a signal arrives: the process that `start` starts")
    serve.add_argument("port", type=int, metavar="PORT", help="0: any")
    add("job", "run one job, whose folder is FOLDER")
    return parser


def _act(args: argparse.Namespace) -> int:
    folder: Path = args.folder
    if args.action == "serve":
        return _serve(folder, args.port)
    if args.action == "job":
        from .job_process import run_job

        return run_job(folder)
    if args.action == "run":
        # `phi3 … --rehearse` runs this: killed, it must not leave the command at work.
        ask = control.ends_with_parent()
        if ask is not None:
            ask()
        command = args.command[1:] if args.command[:1] == ["--"] else args.command
        return control.run_inside(command, folder)

    answer: Any
    if args.action == "start":
        answer = control.start(folder, faults=args.fault).about()
    elif args.action == "stop":
        answer = {"stopped": control.stop(folder), "forgotten": args.forget, "folder": str(folder)}
        if args.forget:
            shutil.rmtree(folder, ignore_errors=True)
    elif args.action == "status":
        running = control.find(folder)
        about = running.about() if running else {"state": "stopped", "folder": str(folder)}
        answer = {**about, "resources": control.held(folder)}
    elif args.action == "env":
        running = control.find(folder)
        if running is None:
            raise UsageError(_NOT_RUNNING)
        answer = running.env
    elif args.action == "clock":
        running = control.find(folder)
        if running is None:
            raise UsageError(_NOT_RUNNING)
        match = re.fullmatch(r"(\d+)([mhd])", args.by)
        if match is None:
            raise UsageError(f"{args.by!r}: expected a duration such as 30m, 9h or 2d")
        answer = running.advance(int(match[1]) * {"m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]])
    elif args.action == "calls":
        answer = control.calls(folder)[-args.n :]
    else:
        faults = Faults(folder / "faults.json")
        if args.clear:
            faults.clear()
        if args.fault:
            faults.add(args.fault)
        answer = [fault.as_typed() for fault in faults.pending()]
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
    return 0


def _serve(folder: Path, port: int) -> int:
    """Answer until a signal comes; then end the jobs and servers that run here."""
    # Importing a service module declares the calls that it answers.
    from . import (
        assets,
        compute,
        endpoints,
        jobs,
        logic,
        metrics,
        resources,
        storage,
        workspaces,
    )
    from .proxy import Authority, Proxy

    del assets, metrics, resources, storage, workspaces
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    cloud = Cloud(folder)
    proxy = Proxy(cloud, Authority(folder), port)
    # Servers ended with the process before this one; their deployments are still there.
    with cloud.lock:
        endpoints.resume_deployments(cloud)
        cloud.save()
    control.write_process(folder, proxy.port)
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    while not ended.wait(_CLOCK_SECONDS):
        with cloud.lock:
            logic.run_due(cloud)
            cloud.save()
    # First the door, so that no call starts what would outlive this process.
    proxy.close()
    with cloud.lock:
        for job in cloud.children("/subscriptions", jobs.KIND):
            jobs.cancel(cloud, job)
        for deployment in cloud.children("/subscriptions", compute.DEPLOYMENT_KIND):
            stop_server_of(deployment)
        cloud.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
