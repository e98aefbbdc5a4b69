"""`phi3 doctor`: looks for faults that keep the flow from answering, or fail silently."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from .. import console, sunset
from ..current import all_runs
from ..errors import UsageError
from ..manifests import ConnectionManifest
from ..packages import has_prompt_flow
from ..project import FLOW, find
from . import HELP
from .common import add_command, current_run, tuned_run

if TYPE_CHECKING:
    from ..doctor import Finding
    from ..verify.parity import Places

SIGNS = {
    "ok": "[green]✓[/]",
    "warning": "[yellow]![/]",
    "fault": "[red]✗[/]",
    "skipped": "[dim]–[/]",
}


def register_doctor(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "doctor",
        HELP["doctor"],
        "phi3 doctor",
        run_doctor,
    )
    parser.add_argument("--run", metavar="NAME", help="check this run's connection, or its model")
    parser.add_argument(
        "--connection",
        metavar="NAME",
        help="connection to check (default: the one that the flow names)",
    )
    parser.add_argument("--flow", type=Path, metavar="FOLDER", help=f"default: {FLOW}")
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time limit for an answer (default 30)",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="only check that training and serving produce the same tokens",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="check a model folder's tokens instead of a run's",
    )
    parser.add_argument(
        "--tool",
        nargs="?",
        const="here",
        choices=("here", "fresh"),
        help="only build the wheel and look for the package tool in it, with this environment's "
        "Prompt flow (here) or in a new environment, over the network (fresh)",
    )
    parser.add_argument(
        "--agent",
        action="store_true",
        help="only send the golden conversations through Prompt flow and through the agent, and "
        "compare requests, answers and errors",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="with --agent: your own rows instead (as for phi3 batch)",
    )
    parser.add_argument(
        "--dates",
        action="store_true",
        help="only print what ends when, who says so, and what to do (as of another day: "
        "PHI3_TODAY=YYYY-MM-DD)",
    )


def run_doctor(args: argparse.Namespace) -> int:
    """All checks, or the one that is named; exit 1 on a fault."""
    if args.dates:
        return _run_dates(args)
    if args.tokens or args.model is not None:
        return _run_tokens(args)
    if args.data is not None and not args.agent:
        raise UsageError("--data goes with --agent: phi3 doctor --agent --data FILE")
    if args.agent:
        return _run_agent(args)
    if args.tool:
        from ..toolcheck import check_tool

        project = find(Path("tools/phi3_tool")).parents[1]
        return _report(args, check_tool(project, new_environment=args.tool == "fresh"))
    return _run_checks(args)


def _run_checks(args: argparse.Namespace) -> int:
    from ..doctor import Setup, examine, unfinished_rollouts
    from ..targets.local import settings_from_server

    if args.timeout <= 0:
        raise UsageError("--timeout must be a number of seconds above 0")
    setup = Setup(
        flow=args.flow or find(FLOW),
        connection=_connection(args),
        seconds=args.timeout,
        without_store=lambda: settings_from_server(current_run(args)),
    )
    runs = [current_run(args)] if args.run else all_runs(args.runs)
    return _report(args, chain(examine(setup), unfinished_rollouts(runs)))


def _report(args: argparse.Namespace, found: Iterable[Finding]) -> int:
    """Show the findings as they come, then their sum; exit 1 on a fault."""
    from ..doctor import State

    findings: list[Finding] = []
    for finding in found:
        findings.append(finding)
        if args.output == "text":
            _show(finding, first=len(findings) == 1 or findings[-2].group != finding.group)
    counts = {state: sum(each.state is state for each in findings) for state in State}
    ok = counts[State.FAULT] == 0
    if args.output == "json":
        console.print_json({"ok": ok, "findings": [each.as_dict() for each in findings]})
    else:
        said = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
        console.out.print(f"{'Healthy' if ok else 'Not healthy'}: {said}", markup=False)
    return 0 if ok else 1


def _run_dates(args: argparse.Namespace) -> int:
    """The whole table of dates; always exit 0, for a date is no fault."""
    day = sunset.today()
    rows = sunset.in_order()
    if args.output == "json":
        table = [row.as_dict(day) for row in rows]
        console.print_json({"today": day, "checked": sunset.CHECKED, "dates": table})
        return 0
    due = sunset.due(day)
    console.out.print(f"As of {day}; the table was checked on {sunset.CHECKED}", markup=False)
    for row in rows:
        sign = SIGNS["warning" if row in due else "ok" if row.used else "skipped"]
        console.out.print(f"{sign} [bold]{row.date or 'no date'!s:<10}[/] ", end="")
        note = f" ({row.note})" if row.note else ""
        console.out.print(f"{row.what}{note}. Do: {row.cure}", markup=False)
        console.out.print(f"             {row.source}", markup=False, style="dim")
    warned = f"! used here, ends within {sunset.WITHIN} days or has ended"
    console.out.print(f"{warned}; ✓ used here; – not used by this product", markup=False)
    return 0


def _run_agent(args: argparse.Namespace) -> int:
    """Compare Prompt flow and the agent row by row; exit 1 on a difference."""
    from ..agent.golden import golden_rows
    from ..agent.parity import compare
    from ..agent.rows import own_rows

    rows = golden_rows() if args.data is None else own_rows(args.data)
    console.err.print(f"Asking Prompt flow and the agent {len(rows)} questions each …")
    found = list(compare(rows))
    different = [each for each in found if each.difference]
    requests = sum(each.requests for each in found)
    if args.output == "json":
        console.print_json(
            {
                "ok": not different,
                "rows": len(found),
                "requests": requests,
                "differences": [{"row": e.name, "difference": e.difference} for e in different],
            }
        )
        return 1 if different else 0
    for each in found:
        if each.difference or args.data is None:
            sign = SIGNS["fault" if each.difference else "ok"]
            console.out.print(f"{sign} [bold]{escape(each.name):<32}[/] ", end="")
            console.out.print(each.said, markup=False)
    verdict = f"{len(different)} of {len(found)} rows differ" if different else "The same"
    console.out.print(f"{verdict}: {len(found)} rows, {requests} requests", markup=False)
    return 1 if different else 0


def _connection(args: argparse.Namespace) -> str | None:
    """The name given, or the named run's; None lets the flow say."""
    if args.connection or not args.run or not has_prompt_flow():
        name: str | None = args.connection
        return name
    run = current_run(args)
    manifest = run.require(ConnectionManifest)
    return manifest.own or manifest.name


def _show(finding: Finding, *, first: bool) -> None:
    group = finding.group if first else ""
    console.out.print(f"{SIGNS[finding.state.value]} [bold]{group:<12}[/]", end="")
    said = f"{finding.check:<13} {finding.said}"
    if finding.state.value == "skipped":
        said = f"{finding.check:<13} skipped: {finding.said}"
    console.out.print(said, markup=False, end="")
    word = "Look with" if finding.state.value == "skipped" else "Fix"
    console.out.print(f". {word}: {finding.fix}" if finding.fix else "", markup=False)


def _run_tokens(args: argparse.Namespace) -> int:
    """Compare tokens everywhere; exit 1 when a place writes other ones."""
    from ..verify.parity import check_tokens

    report = check_tokens(_places(args))
    if args.output == "json":
        console.print_json({"tokens": report.as_dict()})
    else:
        verdict = "the same everywhere" if report.ok else "DIFFERENT"
        compared = f"({report.cases} conversations, compared with the trainer's rows)"
        console.out.print(f"tokens: {verdict} {compared}", markup=False)
        for line in report.lines():
            console.out.print(f"  {line}", markup=False)
    return 0 if report.ok else 1


def _places(args: argparse.Namespace) -> Places:
    """What is to be compared."""
    from ..verify.parity import places_of_folder, places_of_run

    if args.model is None:
        return places_of_run(tuned_run(args))
    if args.run:
        raise UsageError("Give --run NAME or --model FOLDER, not both")
    return places_of_folder(args.model)
