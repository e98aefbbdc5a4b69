"""`phi3 status | down`: what runs or bills, here and on Azure, and how it is stopped."""

from __future__ import annotations

import argparse
import os

from phi3_tool.errors import Phi3Error

from .. import console
from ..errors import Phi3TrainingError, StageError, UsageError
from ..manifests import EndpointManifest
from ..rag.index_files import service_line, services_of, take_down
from ..run import Run
from ..runs import RunState, all_runs, state_of
from ..targets import HERE, Overview, get_target, is_here, target_of
from . import HELP
from .common import confirm, named_run
from .options import Subparsers, add_command, add_on, add_place, add_rehearse, add_run, place_in


def register_status(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    status = add_command(subparsers, "status", HELP["status"], "phi3 status", run_status)
    add_run(status, "one run only")
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
    add_run(down, "same as RUN", dest="named")
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
    place = place_in(args)
    runs = [] if place else _runs(args, args.run)
    # Asking Azure takes seconds and a sign-in, so only where it is named: `phi3 status` is instant.
    asks = args.on == "azure" or args.run is not None
    names = {target_of(run) for run in runs} | ({"azure"} if args.on == "azure" else set())
    targets = {name: get_target(name) for name in names if asks}
    states = [state_of(run, targets.get(target_of(run))) for run in runs]
    workspaces: list[Overview] = []
    for name, target in targets.items():
        if target.cloud is not None:
            own = [run for run in runs if target_of(run) == name]
            # Its workspaces once for all of its runs: they share them.
            workspaces += target.cloud.overview(own, place, search=args.run is None)
    if args.output == "json":
        console.print_json([*(state.as_json() for state in states), *workspaces])
        return 0
    if not states and not workspaces:
        # What there is instead: runs elsewhere, or nothing yet.
        others = len(all_runs(args.runs))
        if place:
            text = "phi3 has made nothing there"
        elif others:
            text = f"No runs on {args.on} under {args.runs}; {others} elsewhere, see: phi3 runs"
            text += ". In the rehearsal: phi3 status --rehearse" if args.on == "azure" else ""
        elif args.on == "azure":
            text = (
                f"No runs under {args.runs}, and nothing of phi3's was found on Azure. Look in "
                "another place: phi3 status --on azure --subscription GUID, or with --workspace "
                "NAME"
            )
        else:
            text = f"No runs under {args.runs} yet; create one with: phi3 up"
        console.line(text)
    for state in states:
        _show_state(state)
    for workspace in workspaces:
        console.out.print(
            f"[bold]{workspace['workspace']}[/]  {workspace['resource_group']}, Azure"
        )
        for line in workspace["lines"]:
            console.line(f"  {line}")
    if len(workspaces) > 1:
        costs = [workspace["usd"] for workspace in workspaces]
        usd = {key: sum(cost[key] for cost in costs) for key in costs[0]}
        console.line(
            f"all {len(workspaces)} workspaces: {usd['per_hour']:.2f} USD per hour, about "
            f"{usd['so_far']:.2f} so far, at most {usd['until_deadlines']:.2f} more until the "
            f"deadlines; {usd['per_hour_without_deadline']:.2f} per hour without one"
        )
    if args.run is None and args.on in (None, "azure"):
        for run in services_of(args.runs):
            console.line(
                _search_service(run) if args.on is None else f"{run.name}: {service_line(run)}"
            )
    return 0


def _search_service(run: Run) -> str:
    command = f"phi3 rag down --run {run.name}"
    return (
        f"{run.name}: an Azure AI Search service that bills by the hour until its deadline (phi3 "
        f"status --on azure; later: phi3 rag extend 2d --run {run.name}); delete it: {command}"
    )


def _runs(args: argparse.Namespace, name: str | None) -> list[Run]:
    runs = [named_run(args.runs, name)] if name is not None else all_runs(args.runs)
    return [run for run in runs if args.on in (None, target_of(run))]


def _show_state(state: RunState) -> None:
    endpoint = state.status["endpoint"]
    current = " (current)" if state.current else ""
    console.out.print(f"[bold]{state.run}[/]{current}  {', '.join(state.done)}")
    process = f" (process {endpoint['pid']})" if endpoint.get("pid") else ""
    where = f" {endpoint['url']}{process}" if endpoint.get("url") else ""
    console.line(f"  endpoint: {state.endpoint}{where}")
    if state.on != HERE and "lines" not in state.status:
        command = f"phi3 status --on {state.on} --run {state.run}"
        console.line(f"  on {state.on}; see what exists there: {command}")
    for remark in state.remarks:
        console.line(f"  note: {remark}", "yellow")
    for fault in state.broken:
        console.line(f"  broken: {fault}")
    for line in state.status.get("lines", []):
        console.line(f"  {line}")
    if state.adapters:
        console.line(f"  adapters: {', '.join(state.adapters)}")


def run_down(args: argparse.Namespace) -> int:
    """Stop what one run started, or all runs of a target."""
    name = args.run or args.named
    place = place_in(args)
    if place:
        return _down_in(args, place, name)
    # Documents have no journey: their run has no stage, and on Azure only its search service.
    services = [run for run in services_of(args.runs) if name in (None, run.name)]
    runs = [] if services and name is not None else _runs(args, name)
    # `phi3 down` alone never deletes on Azure: it says what may be billing there instead.
    away: list[str] = []
    if args.on is None and name is None:
        away = [run.name for run in runs if not is_here(run) and run.read(EndpointManifest)]
        runs = [run for run in runs if is_here(run)]
    only = "failed" if args.failed else "idle" if args.idle else "all" if args.all else "run"
    if only != "run" and any(is_here(run) for run in runs):
        raise UsageError(f"--{only} is for runs on Azure: phi3 down --on azure --{only}")
    stopped: list[str] = []
    broken: list[str] = []
    left = [f"{name} is on Azure and may be billing: phi3 down --on azure {name}" for name in away]
    for run in services:
        if args.on != "azure" or only not in ("run", "all"):
            left.append(_search_service(run))
            continue
        try:
            with console.progress_bar("down") as progress:
                stopped.append(take_down(run, progress))
        except (Phi3TrainingError, Phi3Error) as error:
            broken.append(str(error))
    for run in runs:
        try:
            target = get_target(target_of(run))
            cloud = target.cloud
            if cloud is None:
                stopped += target.teardown(run)
                continue
            if only == "all":
                names = [f"  {name}" for name in cloud.all_of(run)]
                # Deleting a workspace also deletes what others may have put there.
                others = "with everything in them, including what phi3 did not create."
                confirm(args, [f"This deletes, for the run {run.name}:", *names, others])
            with run.lock(), console.progress_bar("down") as progress:
                stopped += cloud.remove(run, only, progress)
        except StageError as error:  # what other runs started is still stopped
            broken.append(str(error))
    if args.on == "azure" and not runs and not services:
        # `phi3 azure provision` creates a workspace that no run folder knows of.
        left.append(
            f"No run under {args.runs} is on Azure. phi3 status --on azure lists what is there "
            "without one; phi3 down --on azure --workspace NAME deletes it."
        )
    return _show_end(args, stopped, broken, left)


def _down_in(args: argparse.Namespace, named: dict[str, str], run: str | None) -> int:
    """Delete what phi3 made in a place on Azure, whatever runs are known here."""
    if run is not None or args.failed or args.idle:
        raise UsageError(
            "A place (--workspace, --resource-group, --subscription) means all runs in it: leave "
            "out the run, --failed and --idle"
        )
    cloud = get_target("azure").cloud
    stopped: list[str] = []
    broken: list[str] = []
    for place in cloud.found(named) if cloud else ():
        # Named and confirmed place by place: what is found by tags may be somebody else's run.
        names = place.names()
        if args.all:
            names.append("the workspace itself, and all that phi3 made for it")
        if not names:
            stopped.append(f"{place.label}: nothing of phi3's that bills")
            continue
        heading = f"This deletes in the {place.label}, of all runs and users:"
        confirm(args, [heading, *(f"  {name}" for name in names)])
        try:
            with console.progress_bar("down") as progress:
                stopped += place.delete(progress, everything=args.all)
        except StageError as error:  # what is elsewhere is still deleted
            broken.append(str(error))
    return _show_end(args, stopped, broken, [])


def _show_end(
    args: argparse.Namespace, stopped: list[str], broken: list[str], left: list[str]
) -> int:
    """What was stopped, what failed, and what is still running; exit status 1 for a failure."""
    for fault in broken:
        console.print_error(fault)
    unsure = args.on == "azure" and left
    lines = stopped or ([] if broken or unsure else ["Nothing of ours is running."])
    # Else `phi3 chat` would still answer after `phi3 down`, and nobody would know why.
    if os.environ.get("PHI3_ENDPOINT"):
        left = [*left, "PHI3_ENDPOINT names an endpoint that phi3 did not start: left alone."]
    console.show(args.output, {"stopped": stopped, "broken": broken}, *lines, *left)
    return 1 if broken else 0
