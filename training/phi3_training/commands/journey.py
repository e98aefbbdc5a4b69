"""`phi3 up | plan`: the whole journey, and what it would do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from .. import console
from ..errors import UsageError
from ..finetune.adapters import list_adapters
from ..journey import Journey, Stage, finished, go
from ..run import Run
from ..stages_azure import stages_of
from ..targets import Target, get_target, target_of
from .common import (
    add_adapter,
    add_allow,
    add_command,
    add_force,
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


def run_up(args: argparse.Namespace) -> int:
    """Do the journey and show what came out of it."""
    journey = journey_of(args)
    # A shell that ran `eval "$(phi3 env)"` names some endpoint; `up` asks the one it made.
    os.environ.pop("PHI3_ENDPOINT", None)
    stages = stages_of(journey.target.name)
    with journey.run.lock():
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages, again=_stages_named(args.again, stages))
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
    lines = journey.target.plan(journey.recipe, journey.run)
    if args.output == "json":
        plan = [{"stage": line.stage, "text": line.text, "stops": line.stops} for line in lines]
        console.print_json({"run": str(journey.run.path), "to_do": todo, "plan": plan})
    else:
        console.out.print(f"Run folder: {journey.run.path}", markup=False)
        console.out.print(f"To do: {', '.join(todo) or 'nothing, all is done'}", markup=False)
        for line in lines:
            mark = "STOPS" if line.stops else "     "
            console.out.print(f"  {mark} {line.stage:<10} {line.text}", markup=False)
    return 1 if any(line.stops for line in lines) else 0


def _is_done(journey: Journey, stages: Sequence[Stage], stage: Stage) -> bool:
    """Done with unchanged inputs, and everything before it as well."""
    before = stages[: stages.index(stage) + 1]
    return all(finished(journey, earlier) is not None for earlier in before)


def state_of(run: Run, target: Target | None = None) -> dict[str, Any]:
    """What of a run is done and up; on Azure as Azure itself says, where `target` is given."""
    name = target_of(run)
    done = [stage.title for stage in stages_of(name) if run.manifest(stage.manifest) is not None]
    if target is None and name != "local":
        status = {"endpoint": {"state": "not asked", **_named(run)}}
    else:
        status = (target or get_target(name)).status(run)
    answer = run.manifest("answer") or {}
    return {
        "run": run.name,
        "path": str(run.path),
        "on": name,
        "done": done,
        **status,
        "adapters": [adapter.name for adapter in list_adapters(run)],
        "question": answer.get("question"),
        "answer": answer.get("answer"),
    }


def _named(run: Run) -> dict[str, Any]:
    """The endpoint that the run folder names."""
    endpoint = run.manifest("endpoint")
    return {} if endpoint is None else {"url": endpoint["endpoint"]}
