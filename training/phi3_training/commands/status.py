"""`phi3 status | down`: what stands, here and on Azure, and its end."""

from __future__ import annotations

import argparse
import os
from typing import Any

from phi3_tool.errors import Phi3Error

from .. import console
from ..current import all_runs
from ..errors import Phi3TrainingError, StageError, UsageError
from ..manifests import EndpointManifest
from ..run import Run
from ..targets import HERE, get_target, is_here, target_of
from . import HELP
from .common import add_command, add_on, add_place, add_rehearse, named_run, place_in
from .rag import services_of, take_down
from .up import state_of


def register_status(subparsers: Any) -> None:
    """Add the commands of this module."""
    status = add_command(subparsers, "status", HELP["status"], "phi3 status", run_status)
    status.add_argument("--run", metavar="NAME", help="one run only")
    add_on(status, "only the runs there; azure: ask Azure what exists and what bills")
    add_rehearse(status)
    add_place(status, "look there, also without a run folder")
    down = add_command(
        subparsers,
        "down",
        HELP["down"],
        "phi3 down --on azure --run phi3-mini-azure",
        run_down,
    )
    down.add_argument("run", nargs="?", metavar="RUN", help="one run only")
    down.add_argument("--run", dest="named", metavar="NAME", help="same as RUN")
    add_on(down, "only the runs there (default: where the run is, else this machine)")
    add_rehearse(down)
    add_place(down, "delete what phi3 made there, also without a run folder; asks first")
    down.add_argument(
        "--failed",
        action="store_true",
        help="on Azure: only deployments and clusters that failed; they bill as well",
    )
    down.add_argument(
        "--idle",
        action="store_true",
        help="on Azure: only the run's deployments without traffic, and the failed ones",
    )
    down.add_argument(
        "--all",
        action="store_true",
        help="on Azure: also the workspace and everything else that `up` created for it",
    )


def run_status(args: argparse.Namespace) -> int:
    """List the runs under --runs; with --on azure or --run, from Azure itself."""
    named = place_in(args)
    runs = [] if named else _runs(args, args.run)
    asks = args.on == "azure" or args.run is not None
    names = {target_of(run) for run in runs} | ({"azure"} if args.on == "azure" else set())
    targets = {name: get_target(name) for name in names if asks}
    states = [state_of(run, targets.get(target_of(run))) for run in runs]
    places: list[dict[str, Any]] = []
    for name, target in targets.items():
        if target.cloud is not None:
            own = [run for run in runs if target_of(run) == name]
            places += target.cloud.overview(own, named, search=args.run is None)
    if args.output == "json":
        console.print_json([*states, *places])
        return 0
    if not states and not places:
        console.out.print(_no_runs(args), markup=False)
    for state in states:
        _show_state(state)
    _show_places(places)
    if args.run is None and args.on in (None, "azure"):
        for run in services_of(args.runs):
            console.out.print(_bills(run), markup=False)
    return 0


def _bills(run: Run) -> str:
    command = f"phi3 rag down --run {run.name}"
    return f"{run.name}: an Azure AI Search service that bills by the hour; delete it: {command}"


def _show_places(places: list[dict[str, Any]]) -> None:
    """Each workspace once, and the sum over all of them."""
    for place in places:
        console.out.print(f"[bold]{place['workspace']}[/]  {place['resource_group']}, Azure")
        for line in place["lines"]:
            console.out.print(f"  {line}", markup=False)
    if len(places) > 1:
        usd = {key: sum(place["usd"][key] for place in places) for key in places[0]["usd"]}
        console.out.print(
            f"all {len(places)} workspaces: {usd['per_hour']:.2f} USD per hour, about "
            f"{usd['so_far']:.2f} so far, at most {usd['until_deadlines']:.2f} more until the "
            f"deadlines; {usd['per_hour_without_deadline']:.2f} per hour without one",
            markup=False,
        )


def _no_runs(args: argparse.Namespace) -> str:
    """What there is instead: runs elsewhere, or nothing yet."""
    others = len(all_runs(args.runs))
    if args.on == "azure" and place_in(args):
        return "phi3 has made nothing there"
    if not others and args.on == "azure":
        return (
            f"No runs under {args.runs}, and nothing of phi3's was found on Azure. Look in another "
            "place: phi3 status --on azure --subscription GUID, or with --workspace NAME"
        )
    if not others:
        return f"No runs under {args.runs} yet; create one with: phi3 up"
    text = f"No runs on {args.on} under {args.runs}; {others} elsewhere, see: phi3 runs"
    return f"{text}. In the rehearsal: phi3 status --rehearse" if args.on == "azure" else text


def _runs(args: argparse.Namespace, name: str | None) -> list[Run]:
    runs = [named_run(args.runs, name)] if name is not None else all_runs(args.runs)
    return [run for run in runs if args.on in (None, target_of(run))]


def _show_state(state: dict[str, Any]) -> None:
    endpoint = state["endpoint"]
    current = " (current)" if state["current"] else ""
    console.out.print(f"[bold]{state['run']}[/]{current}  {', '.join(state['done'])}")
    process = f" (process {endpoint['pid']})" if endpoint.get("pid") else ""
    where = f" {endpoint['url']}{process}" if endpoint.get("url") else ""
    console.out.print(f"  endpoint: {endpoint['state']}{where}", markup=False)
    if state["on"] != HERE and "lines" not in state:
        command = f"phi3 status --on {state['on']} --run {state['run']}"
        console.out.print(f"  on {state['on']}; see what exists there: {command}", markup=False)
    for remark in state["remarks"]:
        console.out.print(f"  note: {remark}", markup=False, style="yellow")
    for fault in state["broken"]:
        console.out.print(f"  broken: {fault}", markup=False)
    for line in state.get("lines", []):
        console.out.print(f"  {line}", markup=False)
    if state["adapters"]:
        console.out.print(f"  adapters: {', '.join(state['adapters'])}", markup=False)


def run_down(args: argparse.Namespace) -> int:
    """Stop what one run started, or all runs of a target."""
    name = args.run or args.named
    named = place_in(args)
    if named:
        return _down_there(args, named, name)
    # Documents have no journey: their run has no stage, and no place on Azure but its service.
    services = [run for run in services_of(args.runs) if name in (None, run.name)]
    runs = [] if services and name is not None else _runs(args, name)
    if args.on is None and name is None:
        here = [run for run in runs if is_here(run)]
        away = [run.name for run in runs if run not in here and run.read(EndpointManifest)]
        runs = here
    else:
        away = []
    only = "failed" if args.failed else "idle" if args.idle else "all" if args.all else "run"
    if only != "run" and any(is_here(run) for run in runs):
        raise UsageError(f"--{only} is for runs on Azure: phi3 down --on azure --{only}")
    lines: list[str] = []
    broken: list[str] = []
    bills: list[str] = []
    for run in services:
        if args.on != "azure" or only not in ("run", "all"):
            bills.append(_bills(run))
            continue
        try:
            lines.append(take_down(run))
        except (Phi3TrainingError, Phi3Error) as error:
            broken.append(str(error))
    for run in runs:
        try:
            lines += _teardown(args, run, only)
        except StageError as error:  # what other runs started is still stopped
            broken.append(str(error))
    _show_end(args, lines, broken, away, bills)
    return 1 if broken else 0


def _down_there(args: argparse.Namespace, named: dict[str, str], run: str | None) -> int:
    """Delete what phi3 made in a place on Azure, whatever runs are known here."""
    if run is not None or args.failed or args.idle:
        raise UsageError(
            "A place (--workspace, --resource-group, --subscription) means all runs in it: leave "
            "out the run, --failed and --idle"
        )
    cloud = get_target("azure").cloud
    lines: list[str] = []
    broken: list[str] = []
    for place in cloud.found(named) if cloud else ():
        names = place.names()
        if args.all:
            names.append("the workspace itself, and all that phi3 made for it")
        if not names:
            lines.append(f"{place.label}: nothing of phi3's that bills")
            continue
        said = [f"This deletes in the {place.label}, of all runs and users:"]
        confirm(args, [*said, *(f"  {name}" for name in names)])
        try:
            with console.progress_bar("down") as progress:
                lines += place.delete(progress, everything=args.all)
        except StageError as error:  # what is elsewhere is still deleted
            broken.append(str(error))
    _show_end(args, lines, broken, [], [])
    return 1 if broken else 0


def _teardown(args: argparse.Namespace, run: Run, only: str) -> list[str]:
    target = get_target(target_of(run))
    cloud = target.cloud
    if cloud is None:
        return target.teardown(run)
    if only == "all":
        _confirm(args, cloud.all_of(run), run)
    with run.lock(), console.progress_bar("down") as progress:
        return cloud.remove(run, only, progress)


def _confirm(args: argparse.Namespace, names: list[str], run: Run) -> None:
    """Deleting a workspace also deletes what others may have put there."""
    lines = [f"This deletes, for the run {run.name}:", *(f"  {name}" for name in names)]
    confirm(args, [*lines, "with everything in them, including what phi3 did not create."])


def confirm(args: argparse.Namespace, lines: list[str]) -> None:
    """Show what would be deleted and ask. Raises UsageError unless --yes or a typed yes."""
    if args.yes:
        return
    for line in lines:
        console.err.print(line, markup=False)
    try:
        said = input("Type yes to continue: ") if os.isatty(0) else ""
    except EOFError:
        said = ""
    if said.strip().lower() != "yes":
        raise UsageError("Nothing was deleted; without a terminal, confirm with --yes")


def _show_end(
    args: argparse.Namespace,
    lines: list[str],
    broken: list[str],
    away: list[str],
    bills: list[str],
) -> None:
    for fault in broken:
        console.print_error(fault)
    if args.output == "json":
        console.print_json({"stopped": lines, "broken": broken})
        return
    for line in lines:
        console.out.print(line, markup=False)
    if not lines and not broken:
        console.out.print("Nothing of ours is running.")
    for name in away:
        command = f"phi3 down --on azure {name}"
        console.out.print(f"{name} is on Azure and may be billing: {command}", markup=False)
    for line in bills:
        console.out.print(line, markup=False)
    if os.environ.get("PHI3_ENDPOINT"):
        console.out.print("PHI3_ENDPOINT names an endpoint that phi3 did not start: left alone.")
