"""`phi3 up | plan | status | down`: the whole journey, what it would do, what is up, the end."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from .. import console
from ..errors import StageError, UsageError
from ..finetune.adapters import list_adapters
from ..journey import Journey, finished, go, refuse_unfit
from ..memory import memory_plan, of_size
from ..planning import PlanLine
from ..run import Run
from ..stages import STAGES
from ..targets import get_target
from .common import (
    add_adapter,
    add_allow,
    add_command,
    add_force,
    add_no_plan,
    add_recipe,
    all_runs,
    journey_of,
)
from .summary import show_summary


def register(subparsers: Any) -> None:
    """Add the commands of this module."""
    up = add_command(
        subparsers,
        "up",
        "do every stage that is not done yet, from chats to an answer in Prompt flow",
        "phi3 up training/recipes/phi3-tiny.yaml finetune.num_train_epochs=10",
        run_up,
    )
    add_recipe(up)
    up.add_argument("--again", action="append", default=[], metavar="STAGE", help="redo a stage")
    add_adapter(up)
    add_allow(up)
    add_force(up)
    add_no_plan(up)
    plan = add_command(
        subparsers,
        "plan",
        "say what `up` would do and what would stop it; changes nothing",
        "phi3 plan training/recipes/phi3-mini-lora.yaml",
        run_plan,
    )
    add_recipe(plan)
    plan.add_argument(
        "--device-gb",
        type=_size,
        metavar="GB",
        help="memory only, on a GPU of this size instead of this machine",
    )
    plan.add_argument(
        "--device", choices=("cuda", "cpu"), help="kind of that device (default: cuda)"
    )
    add_command(
        subparsers, "status", "list the runs, their stages and endpoints", "phi3 status", run_status
    )
    down = add_command(
        subparsers, "down", "stop the endpoints that `up` started", "phi3 down", run_down
    )
    down.add_argument("run", nargs="?", metavar="RUN", help="one run only")


def run_up(args: argparse.Namespace) -> int:
    """Do the journey and show what came out of it."""
    journey = journey_of(args)
    # A shell that ran `eval "$(phi3 env)"` names some endpoint; `up` asks the one it made.
    os.environ.pop("PHI3_ENDPOINT", None)
    with journey.run.lock():
        again = _stages_named(args.again)
        refuse_unfit(journey, STAGES, again=again)
        go(journey, STAGES, again=again)
    if args.output == "json":
        console.print_json(_state(journey.run))
    else:
        show_summary(journey)
    return 0


def _stages_named(titles: list[str]) -> frozenset[str]:
    known = {stage.title: stage.manifest for stage in STAGES}
    wrong = [title for title in titles if title not in known]
    if wrong:
        raise UsageError(f"No stage {', '.join(wrong)}; stages: {', '.join(known)}")
    return frozenset(known[title] for title in titles)


def run_plan(args: argparse.Namespace) -> int:
    """Say what would be done."""
    journey = journey_of(args, make_run=False)
    todo = [stage.title for stage in STAGES if not _is_done(journey, stage.manifest)]
    lines = _plan_elsewhere(args, journey) or journey.target.plan(journey.recipe, journey.run)
    if args.output == "json":
        plan = [asdict(line) for line in lines]
        console.print_json({"run": str(journey.run.path), "to_do": todo, "plan": plan})
    else:
        console.out.print(f"Run folder: {journey.run.path}", markup=False)
        console.out.print(f"To do: {', '.join(todo) or 'nothing, all is done'}", markup=False)
        for line in lines:
            mark = "STOPS" if line.stops else "     "
            console.out.print(f"  {mark} {line.stage:<10} {line.text}", markup=False)
    return 1 if any(line.stops for line in lines) else 0


def _plan_elsewhere(args: argparse.Namespace, journey: Journey) -> list[PlanLine]:
    """What a device that is not here would hold; nothing where no such one is named."""
    if args.device_gb is not None:
        return memory_plan(journey.recipe, of_size(args.device_gb, args.device or "cuda"))
    if args.device is not None:
        raise UsageError("--device says what kind --device-gb is; add e.g. --device-gb 24")
    return []


def _size(text: str) -> float:
    """A size in gigabytes, more than none."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise argparse.ArgumentTypeError(f"expected gigabytes such as 24, got {text!r}")
    return size


def _is_done(journey: Journey, manifest: str) -> bool:
    """Done with unchanged inputs, and everything before it as well."""
    stages = STAGES[: [stage.manifest for stage in STAGES].index(manifest) + 1]
    return all(finished(journey, stage) is not None for stage in stages)


def run_status(args: argparse.Namespace) -> int:
    """List the runs under --runs."""
    states = [_state(run) for run in all_runs(args.runs)]
    if args.output == "json":
        console.print_json(states)
    elif not states:
        console.out.print(f"No runs under {args.runs} yet; make one with: phi3 up", markup=False)
    for state in states if args.output == "text" else []:
        endpoint = state["endpoint"]
        console.out.print(f"[bold]{state['run']}[/]  {', '.join(state['done'])}")
        where = f" {endpoint['url']} (process {endpoint['pid']})" if endpoint.get("url") else ""
        for fault in state["broken"]:
            console.out.print(f"  broken: {fault}", markup=False)
        console.out.print(f"  endpoint: {endpoint['state']}{where}", markup=False)
        if state["adapters"]:
            console.out.print(f"  adapters: {', '.join(state['adapters'])}", markup=False)
    return 0


def _state(run: Run) -> dict[str, Any]:
    """What is done and up; a manifest that cannot be read is named and hides nothing else."""
    found: dict[str, dict[str, Any]] = {}
    broken: dict[str, str] = {}
    for stage in STAGES:
        try:
            manifest = run.manifest(stage.manifest)
        except StageError as error:
            broken[stage.manifest] = str(error)
            continue
        if manifest is not None:
            found[stage.manifest] = manifest
    unknown = {"endpoint": {"state": "unknown"}}
    answer = found.get("answer", {})
    return {
        "run": run.name,
        "path": str(run.path),
        "done": [stage.title for stage in STAGES if stage.manifest in found],
        "broken": list(broken.values()),
        **(unknown if "endpoint" in broken else get_target("local").status(run)),
        "adapters": [] if "base" in broken else [adapter.name for adapter in list_adapters(run)],
        "question": answer.get("question"),
        "answer": answer.get("answer"),
    }


def run_down(args: argparse.Namespace) -> int:
    """Stop the endpoints of one run, or of all."""
    runs = all_runs(args.runs)
    if args.run is not None:
        runs = [run for run in runs if run.name == args.run]
        if not runs:
            raise UsageError(f"There is no run {args.run!r} under {args.runs}; see: phi3 status")
    target = get_target("local")
    lines: list[str] = []
    broken: list[str] = []
    for run in runs:
        try:
            lines += target.teardown(run)
        except StageError as error:  # the other endpoints are stopped all the same
            broken.append(str(error))
    if args.output == "json":
        console.print_json({"stopped": lines, "broken": broken})
    elif lines:
        for line in lines:
            console.out.print(line, markup=False)
    elif not broken:
        console.out.print("Nothing of ours is running.")
    for fault in broken:
        console.print_error(fault)
    if os.environ.get("PHI3_ENDPOINT") and args.output == "text":
        console.out.print("PHI3_ENDPOINT names an endpoint that phi3 did not start: left alone.")
    return 1 if broken else 0
