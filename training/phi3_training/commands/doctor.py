"""`phi3 doctor | lint`: finds what keeps the flow from answering, and what no longer runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from .. import console, sunset
from ..errors import UsageError
from ..manifests import ConnectionManifest
from ..packages import has_prompt_flow
from ..project import FLOW, find
from ..runs import all_runs
from . import HELP
from .common import current_run, tuned_run
from .options import Subparsers, add_command, add_run

if TYPE_CHECKING:
    from ..doctor import Finding

SIGNS = {
    "ok": "[green]✓[/]",
    "warning": "[yellow]![/]",
    "fault": "[red]✗[/]",
    "skipped": "[dim]–[/]",
}


def register_doctor(subparsers: Subparsers) -> None:
    """Add `phi3 doctor`."""
    parser = add_command(subparsers, "doctor", HELP["doctor"], "phi3 doctor", run_doctor)
    add_run(parser, "check this run's connection, or its model")
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
        help="only send the golden conversations through Prompt flow and the agent, and "
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
        help="only print what ends when, the source, and what to do (as of another day: "
        "PHI3_TODAY=YYYY-MM-DD)",
    )


def run_doctor(args: argparse.Namespace) -> int:
    """All checks, or the one that is named; exit 1 on a fault."""
    if args.dates:
        return _run_dates(args)
    if args.tokens or args.model is not None:
        from ..verify.parity import check_tokens, places_of_folder, places_of_run

        if args.model is not None and args.run:
            raise UsageError("Give --run NAME or --model FOLDER, not both")
        folder = args.model
        report = check_tokens(
            places_of_run(tuned_run(args)) if folder is None else places_of_folder(folder)
        )
        verdict = "the same everywhere" if report.ok else "DIFFERENT"
        compared = f"({report.cases} conversations, compared with the trainer's rows)"
        lines = (f"  {line}" for line in report.lines())
        found = {"tokens": report.as_dict()}
        console.show(args.output, found, f"tokens: {verdict} {compared}", *lines)
        return 0 if report.ok else 1
    if args.data is not None and not args.agent:
        raise UsageError("--data goes with --agent: phi3 doctor --agent --data FILE")
    if args.agent:
        return _run_agent(args)
    if args.tool:
        from ..doctor.package_tool import check_tool

        # Of a clone: an installed wheel has no sources to build another from.
        project = find(Path("tools/phi3_tool")).parents[1]
        return _report(args, check_tool(project, new_environment=args.tool == "fresh"))
    from ..doctor import Setup, examine, unfinished_rollouts
    from ..targets.local import settings_from_server

    if args.timeout <= 0:
        raise UsageError("--timeout must be a number of seconds above 0")
    connection = args.connection  # None: the one that the flow names
    if args.run and not connection and has_prompt_flow():
        manifest = current_run(args).require(ConnectionManifest)
        connection = manifest.own or manifest.name
    setup = Setup(
        flow=args.flow or find(FLOW),
        connection=connection,
        seconds=args.timeout,
        without_store=lambda: settings_from_server(current_run(args)),
    )
    # Every run's rollout: a half-done one may be on a run that nobody has chosen for weeks.
    runs = [current_run(args)] if args.run else all_runs(args.runs)
    return _report(args, chain(examine(setup), unfinished_rollouts(runs)))


def _report(args: argparse.Namespace, checks: Iterable[Finding]) -> int:
    """Show the findings as they come, then how many there are of each kind; exit 1 on a fault."""
    from ..doctor import State

    # One by one as they come: a check of the endpoint may take --timeout seconds.
    findings: list[Finding] = []
    for finding in checks:
        if args.output == "text":
            is_first = not findings or findings[-1].group != finding.group
            skipped = finding.state is State.SKIPPED
            sign, group = SIGNS[finding.state.value], finding.group if is_first else ""
            console.out.print(f"{sign} [bold]{group:<12}[/]", end="")
            fix = f". {'Look with' if skipped else 'Fix'}: {finding.fix}" if finding.fix else ""
            text = f"{'skipped: ' if skipped else ''}{finding.said}"
            console.line(f"{finding.check:<13} {text}{fix}")
        findings.append(finding)
    counts = {state: sum(each.state is state for each in findings) for state in State}
    ok = counts[State.FAULT] == 0
    counted = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
    console.show(
        args.output,
        {"ok": ok, "findings": [each.as_dict() for each in findings]},
        f"{'Healthy' if ok else 'Not healthy'}: {counted}",
    )
    return 0 if ok else 1


def _run_dates(args: argparse.Namespace) -> int:
    """The whole table of dates; always exit 0, for a date is no fault."""
    day = sunset.today()
    # All of them, also what people bring from tutorials.
    rows = sunset.in_order()
    if args.output == "json":
        table = [row.as_dict(day) for row in rows]
        console.print_json({"today": day, "checked": sunset.CHECKED, "dates": table})
        return 0
    due = sunset.due(day)
    console.line(f"As of {day}; the table was checked on {sunset.CHECKED}")
    for row in rows:
        sign = SIGNS["warning" if row in due else "ok" if row.used else "skipped"]
        console.out.print(f"{sign} [bold]{row.date or 'no date'!s:<10}[/] ", end="")
        note = f" ({row.note})" if row.note else ""
        console.line(f"{row.what}{note}. Do: {row.cure}")
        console.line(f"             {row.source}", "dim")
    warned = f"! used here, ends within {sunset.WITHIN} days or has ended"
    console.line(f"{warned}; ✓ used here; – not used by this product")
    return 0


def _run_agent(args: argparse.Namespace) -> int:
    """Compare Prompt flow and the agent row by row; exit 1 on a difference."""
    from ..agent.golden import golden_rows, own_rows
    from ..agent.parity import compare

    rows = golden_rows() if args.data is None else own_rows(args.data)
    console.err.print(f"Asking Prompt flow and the agent {len(rows)} questions each …")
    # All of them before the first line: both sides work at once, and end together.
    compared = list(compare(rows))
    different = [row for row in compared if row.difference]
    requests = sum(row.requests for row in compared)
    if args.output == "json":
        console.print_json(
            {
                "ok": not different,
                "rows": len(compared),
                "requests": requests,
                "differences": [
                    {"row": row.name, "difference": row.difference} for row in different
                ],
            }
        )
        return 1 if different else 0
    for row in compared:
        if row.difference or args.data is None:
            sign = SIGNS["fault" if row.difference else "ok"]
            console.out.print(f"{sign} [bold]{escape(row.name):<32}[/] ", end="")
            console.line(row.said)
    verdict = f"{len(different)} of {len(compared)} rows differ" if different else "The same"
    console.line(f"{verdict}: {len(compared)} rows, {requests} requests")
    return 1 if different else 0


def register_lint(subparsers: Subparsers) -> None:
    """Add `phi3 lint`."""
    parser = add_command(subparsers, "lint", HELP["lint"], "phi3 lint my-tutorial", run_lint)
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="FILE | FOLDER",
        help="YAML, notebook, Markdown or Python, or folders with such files",
    )


def run_lint(args: argparse.Namespace) -> int:
    """Show each place with its fix; exit 1 when there is one."""
    from ..lint import files_in, lint

    # Every path that cannot be read is one fault, before any finding is printed.
    files = files_in(args.paths)
    findings = lint(files)
    places = f"{len(findings)} place{'' if len(findings) == 1 else 's'}"
    result = f"{places} to fix" if findings else "Nothing outdated was found"
    console.show(
        args.output,
        {
            "ok": not findings,
            "files": len(files),
            "findings": [finding.as_dict() for finding in findings],
        },
        *map(str, findings),
        f"{result}; {len(files)} file{'' if len(files) == 1 else 's'} read",
    )
    return 1 if findings else 0
