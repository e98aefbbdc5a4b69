"""`phi3 flow push`: a flow, packed and made in the run's workspace and Foundry project."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from .. import console
from ..bundle import pack
from ..errors import UsageError
from ..run import Run
from ..targets import get_target, target_of
from .common import add_command, add_rehearse, all_runs, current_run
from .flow_arguments import add_flow, flow_of


def add_push(actions: Any) -> None:
    """`push`, among the other actions of `phi3 flow`."""
    push = add_command(
        actions,
        "push",
        "upload a flow and make it in the run's workspace and Foundry project",
        "phi3 flow push flows/phi3_chat --run phi3-mini-azure",
        run_push,
    )
    add_flow(push)
    push.add_argument("--run", metavar="NAME", help="which run (default: the last on Azure)")
    push.add_argument(
        "--to",
        choices=("both", "workspace", "project"),
        default="both",
        help="Azure ML's Studio shows the workspace's flows, Foundry the project's",
    )
    push.set_defaults(on="azure")
    add_rehearse(push)


def run_push(args: argparse.Namespace) -> int:
    """Push, and say where the flow opens."""
    from ..targets.azure.target import AzureTarget

    target = get_target("azure")
    assert isinstance(target, AzureTarget)  # noqa: S101 - for mypy: that name is this class
    run = _run(args)
    with tempfile.TemporaryDirectory() as scratch, console.progress_bar("push") as progress:
        progress(0, 0, "packing")
        bundle = pack(
            flow_of(args),
            Path(scratch),
            feed=args.feed,
            image=args.image,
            extra=args.add,
        )
        pushed = target.push(run, bundle, args.to, progress)
    if args.output == "json":
        console.print_json(pushed)
        return 0
    for item in pushed:
        said = "was there already" if item["state"] == "exists" else "is made"
        console.out.print(f"{item['display_name']} {said} in {item['workspace']}", markup=False)
        if item["page"]:
            console.out.print(f"  opens at {item['page']}", markup=False)
    return 0


def _run(args: argparse.Namespace) -> Run:
    if args.run:
        return current_run(args)
    runs = [run for run in all_runs(args.runs) if target_of(run) == "azure"]
    if not runs:
        raise UsageError(f"No run under {args.runs} is on Azure; make one: phi3 up --on azure")
    return runs[0]
