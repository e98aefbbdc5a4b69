"""`phi3 runs | use | rm`: list the runs, choose the current one, delete one."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import Any

from .. import console
from ..errors import MissingExtraError, RecipeError, StageError
from ..journey import RECIPE_FILE
from ..manifests import ConnectionManifest, EndpointManifest, GateManifest
from ..memory.model import gib
from ..recipe import read_yaml
from ..runs import all_runs, current_of, is_current, make_current, remarks, state_of
from ..stages import stages_of
from ..targets import HERE, is_here
from . import HELP
from .common import confirm, named_run
from .options import Subparsers, add_command


def register_runs(subparsers: Subparsers) -> None:
    """Add the commands of this module."""
    add_command(subparsers, "runs", HELP["runs"], "phi3 runs", run_runs)
    use = add_command(subparsers, "use", HELP["use"], "phi3 use phi3-tiny", run_use)
    use.add_argument("run", metavar="RUN", help="the run, as phi3 runs lists it")
    remove = add_command(subparsers, "rm", HELP["rm"], "phi3 rm phi3-tiny", run_rm)
    remove.add_argument("run", metavar="RUN", help="the run, as phi3 runs lists it")


def run_runs(args: argparse.Namespace) -> int:
    """A line for each run."""
    rows: list[dict[str, Any]] = []
    for run in all_runs(args.runs):
        # A folder that is broken in part is listed as well: `phi3 rm` needs its name.
        state = state_of(run)
        try:
            recipe = str(read_yaml(run.path / RECIPE_FILE).get("name", "?"))
        except RecipeError:
            recipe = "?"
        try:
            verdict = run.read(GateManifest)
        except StageError:
            verdict = None
        gate = "-" if verdict is None else "passed" if verdict.passed else "NOT passed"
        rows.append(
            {
                "run": run.name,
                "current": state.current,
                "recipe": recipe,
                "on": state.on,
                "done": state.done,
                "stages": len(stages_of(in_cloud=not is_here(run))),
                "gate": gate,
                "endpoint": state.endpoint,
                "remarks": state.remarks,
                "bytes": _bytes_of(run.path),
            }
        )
    if args.output == "json":
        console.print_json(rows)
        return 0
    if not rows:
        console.out.print(f"No runs under {args.runs} yet; create one with: phi3 up", markup=False)
        return 0
    columns = ["run", "recipe", "stages", "gate", "endpoint", "on disk"]
    console.table(
        f"Runs under {args.runs} (* current; another: phi3 use RUN)",
        columns,
        [
            [
                f"{'* ' if row['current'] else '  '}{row['run']}",
                row["recipe"],
                f"{len(row['done'])} of {row['stages']}",
                row["gate"],
                row["endpoint"] if row["on"] == HERE else f"{row['endpoint']}, on {row['on']}",
                gib(row["bytes"]),
            ]
            for row in rows
        ],
    )
    return 0


def run_use(args: argparse.Namespace) -> int:
    """Make it the current run, for every command and for Prompt flow's connection."""
    run = named_run(args.runs, args.run)
    make_current(run)
    endpoint = state_of(run).endpoint
    start = "" if endpoint in ("up", "not asked") else f"; start it with: phi3 up --run {run.name}"
    text = f"Current run: {run.name}, endpoint {endpoint}{start}"
    console.show(args.output, {"run": run.name, "endpoint": endpoint}, text)
    for remark in remarks(run) if args.output == "text" else ():
        console.line(f"Note: {remark}", "yellow")
    return 0


def run_rm(args: argparse.Namespace) -> int:
    """Delete the folder and the run's connections; not while it serves."""
    run = named_run(args.runs, args.run)
    was_current = is_current(run)
    here = is_here(run)
    on = "" if here else " --on azure"
    # Away from here an endpoint that was not brought down is taken for one that bills.
    serves = state_of(run).endpoint == "up" if here else run.read(EndpointManifest)
    if serves:
        raise StageError(
            f"The run {run.name!r} still has an endpoint; stop it first with: "
            f"phi3 down{on} {run.name}"
        )
    size = gib(_bytes_of(run.path))
    lines = [f"This deletes {run.path} ({size}): model, adapters, figures, prepared chats."]
    if not here:
        lines.append(
            f"What it created on Azure stays and is then unknown here; delete that first with: "
            f"phi3 down --on azure --all {run.name}"
        )
    confirm(args, lines)
    # Here, because it brings Prompt flow, a second of imports.
    from ..flow.store import delete_connections_to

    deleted: list[str] = []
    # A connection store that is broken or gone keeps no run alive.
    with run.lock(), contextlib.suppress(StageError, MissingExtraError):
        manifest = run.read(ConnectionManifest)
        deleted = [] if manifest is None else delete_connections_to(manifest)
    # After the connections: with the manifest gone nothing would name them.
    shutil.rmtree(run.path)
    lines = [f"Deleted {run.path}: {size} freed"]
    now_current = current_of(args.runs)
    if was_current and now_current is not None:
        lines.append(f"The current run is now {now_current.name}")
    return console.show(args.output, {"deleted": str(run.path), "connections": deleted}, *lines)


def _bytes_of(folder: Path) -> int:
    # lstat: a link into a cache of weights is not this run's to count.
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
