"""`python -m phi3_rehearsal ACTION FOLDER …`: the rehearsed Azure whose state lies in FOLDER.

Each action prints one JSON value; what goes wrong is one line on standard error, with exit status 2
for what was asked wrongly and 1 for the rest. `run` alone prints what its command prints.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from .processes import RehearsalError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Do one action; its exit status."""
    args = _parser().parse_args(argv)
    try:
        from . import control
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"The rehearsal needs the package {error.name!r}. "
            'Install it with: pip install "phi3-promptflow[rehearsal]"\n'
        )
        return 1
    del control
    try:
        return int(args.run(args))
    except RehearsalError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, UsageError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m phi3_rehearsal", description=__doc__, allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("folder", type=Path, metavar="FOLDER")
        added.set_defaults(run=run)
        return added

    start = add("start", _start, "start it, or find the one that runs")
    start.add_argument("--fault", action="append", default=[], metavar="FAULT")
    stop = add("stop", _stop, "stop it, with the jobs and servers it runs")
    stop.add_argument("--forget", action="store_true", help="also delete its folder")
    add("status", _status, "whether it runs, and how many resources of each type it has")
    add("env", _env, "the variables that lead the Azure SDKs to it")
    calls = add("calls", _calls, "the calls that it answered, oldest first")
    calls.add_argument("-n", type=int, default=20, metavar="COUNT")
    fault = add("fault", _fault, "inject a fault; without FAULT list the pending ones")
    fault.add_argument("fault", nargs="?", metavar="FAULT")
    fault.add_argument("--clear", action="store_true", help="drop all pending faults first")
    run = add("run", _run, "run COMMAND with these variables and show the calls it makes")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    serve = add("serve", _serve, "answer until a signal comes; what `start` starts")
    serve.add_argument("port", type=int, help="0: any")
    add("job", _job, "carry out one job; FOLDER is the job's")
    return parser


def _print(value: Any) -> int:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    return 0


def _start(args: argparse.Namespace) -> int:
    from .control import start

    return _print(start(args.folder, faults=args.fault).about())


def _stop(args: argparse.Namespace) -> int:
    from .control import stop

    stopped = stop(args.folder)
    if args.forget:
        shutil.rmtree(args.folder, ignore_errors=True)
    folder = str(args.folder)
    return _print({"stopped": stopped, "forgotten": bool(args.forget), "folder": folder})


def _status(args: argparse.Namespace) -> int:
    from .control import find, held

    found = find(args.folder)
    about = found.about() if found else {"state": "stopped", "folder": str(args.folder)}
    return _print({**about, "resources": held(args.folder)})


def _env(args: argparse.Namespace) -> int:
    from .control import find

    found = find(args.folder)
    if found is None:
        raise UsageError("No rehearsed Azure runs here; start it with: phi3 rehearse start")
    return _print(found.env)


def _calls(args: argparse.Namespace) -> int:
    from .control import calls

    return _print(calls(args.folder)[-args.n :])


def _fault(args: argparse.Namespace) -> int:
    from .faults import Faults

    faults = Faults(args.folder / "faults.json")
    if args.clear:
        faults.clear()
    if args.fault:
        faults.add(args.fault)
    return _print([fault.shown() for fault in faults.all()])


def _run(args: argparse.Namespace) -> int:
    from .control import ends_with_parent, run_inside

    ask = ends_with_parent()
    if ask is not None:
        ask()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    return run_inside(command, args.folder)


def _serve(args: argparse.Namespace) -> int:
    """Answer until a signal comes; then end the jobs and servers that run here."""
    # Importing a service module declares the calls that it answers.
    from . import assets, compute, control, endpoints, jobs, resources, storage, workspaces
    from .cloud import Cloud
    from .processes import stop_server_of
    from .proxy import Authority, Proxy

    del assets, compute, resources, storage, workspaces
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    cloud = Cloud(args.folder)
    proxy = Proxy(cloud, Authority(args.folder), args.port)
    with cloud.lock:
        endpoints.resume_deployments(cloud)
        cloud.save()
    control.write_process(args.folder, proxy.port)
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    ended.wait()
    proxy.close()
    with cloud.lock:
        for job in cloud.children("/subscriptions", jobs.KIND):
            jobs.cancel(cloud, job)
        for deployment in cloud.children("/subscriptions", endpoints.DEPLOYMENT_KIND):
            stop_server_of(deployment)
        cloud.save()
    return 0


def _job(args: argparse.Namespace) -> int:
    from .job_process import run_job

    return run_job(args.folder)


if __name__ == "__main__":
    sys.exit(main())
