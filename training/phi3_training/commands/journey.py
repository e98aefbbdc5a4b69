"""`phi3 up | plan`: the whole journey, and what it would do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .. import console
from ..errors import StageError, UsageError
from ..finetune.adapters import list_adapters
from ..journey import Journey, Stage, finished, go
from ..memory import memory_plan, of_size, row_sizes
from ..planning import PlanLine
from ..run import Run
from ..stages_azure import stages_of
from ..targets import Target, get_target, target_of
from .common import (
    add_adapter,
    add_allow,
    add_command,
    add_force,
    add_no_plan,
    add_recipe,
    add_rehearse,
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
    add_rehearse(up)
    plan = add_command(
        subparsers,
        "plan",
        "say what `up` would do and what would stop it; changes nothing",
        "phi3 plan training/recipes/phi3-mini-lora.yaml",
        run_plan,
    )
    add_recipe(plan)
    add_rehearse(plan)
    plan.add_argument(
        "--device-gb",
        type=_size,
        metavar="GB",
        help="memory only, on a GPU of this size instead of this machine",
    )
    plan.add_argument(
        "--device", choices=("cuda", "cpu"), help="kind of that device (default: cuda)"
    )


def run_up(args: argparse.Namespace) -> int:
    """Do the journey and show what came out of it."""
    journey = journey_of(args)
    # A shell that ran `eval "$(phi3 env)"` names some endpoint; `up` asks the one it made.
    os.environ.pop("PHI3_ENDPOINT", None)
    stages = stages_of(journey.target.name)
    with journey.run.lock():
        again = _stages_named(args.again, stages)
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages, again=again)
    if args.output == "json":
        console.print_json(state_of(journey.run, journey.target))
    else:
        show_summary(journey)
    return 0


def _stages_named(titles: list[str], stages: Sequence[Stage]) -> frozenset[str]:
    known = {stage.title: stage.manifest for stage in stages}
    wrong = [title for title in titles if title not in known]
    if wrong:
        raise UsageError(f"No stage {', '.join(wrong)}; stages: {', '.join(known)}")
    return frozenset(known[title] for title in titles)


def run_plan(args: argparse.Namespace) -> int:
    """Say what would be done."""
    journey = journey_of(args, make_run=False)
    stages = stages_of(journey.target.name)
    todo = [stage.title for stage in stages if not _is_done(journey, stages, stage)]
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
        device = of_size(args.device_gb, args.device or "cuda")
        return memory_plan(journey.recipe, device, row_sizes(journey.recipe, journey.run))
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


def _is_done(journey: Journey, stages: Sequence[Stage], stage: Stage) -> bool:
    """Done with unchanged inputs, and everything before it as well."""
    before = stages[: stages.index(stage) + 1]
    return all(finished(journey, earlier) is not None for earlier in before)


def state_of(run: Run, target: Target | None = None) -> dict[str, Any]:
    """What of a run is done and up; on Azure as Azure itself says, where `target` is given.

    A manifest that cannot be read is named and hides nothing else.
    """
    name = target_of(run)
    found, broken = _manifests(run, stages_of(name))
    endpoint, answer = found.get("endpoint"), found.get("answer", {})
    if "endpoint" in broken:
        status: dict[str, Any] = {"endpoint": {"state": "unknown"}}
    elif target is None and name != "local":
        where = {} if endpoint is None else {"url": endpoint["endpoint"]}
        status = {"endpoint": {"state": "not asked", **where}}
    else:
        status = (target or get_target(name)).status(run)
    return {
        "run": run.name,
        "path": str(run.path),
        "on": name,
        "done": [stage.title for stage in stages_of(name) if stage.manifest in found],
        "broken": list(broken.values()),
        **status,
        "adapters": [] if "base" in broken else [adapter.name for adapter in list_adapters(run)],
        "question": answer.get("question"),
        "answer": answer.get("answer"),
    }


def _manifests(
    run: Run, stages: Sequence[Stage]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The run's manifests, and what is wrong with those that cannot be read."""
    found: dict[str, dict[str, Any]] = {}
    broken: dict[str, str] = {}
    for stage in stages:
        try:
            manifest = run.manifest(stage.manifest)
        except StageError as error:
            broken[stage.manifest] = str(error)
            continue
        if manifest is not None:
            found[stage.manifest] = manifest
    return found, broken
