"""`phi3 adapters`: the named adapters of a run, and one of them merged into whole weights."""

from __future__ import annotations

import argparse
from typing import Any

from .. import console
from ..errors import UsageError
from ..finetune.adapters import Adapter, list_adapters, merge_adapter
from ..run import Run
from .common import add_command, all_runs


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "adapters",
        "list the named adapters of a run, or merge one into the base weights",
        "phi3 adapters --merge french",
        run_adapters,
    )
    parser.add_argument("--run", metavar="NAME", help="the run (default: the one worked on last)")
    parser.add_argument("--merge", metavar="ADAPTER", help="write run/merged/ADAPTER")


def run_adapters(args: argparse.Namespace) -> int:
    """List them, or merge one."""
    run = _run(args)
    if args.merge is not None:
        with run.lock():
            folder = merge_adapter(run, args.merge)
        if args.output == "json":
            console.print_json({"name": args.merge, "path": str(folder)})
        else:
            console.out.print(f"Merged {args.merge}: {folder}", markup=False)
        return 0
    found = list_adapters(run)
    if args.output == "json":
        console.print_json([adapter.as_dict() for adapter in found])
    elif not found:
        console.out.print(
            f"The run {run.name!r} has no named adapter; train one: "
            "phi3 train RECIPE --adapter NAME",
            markup=False,
        )
    else:
        columns = ["adapter", "method", "final loss", "folder"]
        console.table(f"Adapters of {run.name}", columns, [_line(adapter) for adapter in found])
    return 0


def _line(adapter: Adapter) -> list[str]:
    stale = "" if adapter.fits else " (of an earlier base: train it again)"
    loss = adapter.notes.get("final_loss", "")
    return [
        adapter.name,
        str(adapter.notes.get("method", "?")),
        str(loss),
        f"{adapter.path}{stale}",
    ]


def _run(args: argparse.Namespace) -> Run:
    runs = [run for run in all_runs(args.runs) if args.run in (None, run.name)]
    if not runs:
        named = f"no run {args.run!r}" if args.run else "no run"
        raise UsageError(f"There is {named} under {args.runs}; make one with: phi3 up")
    return runs[0]
