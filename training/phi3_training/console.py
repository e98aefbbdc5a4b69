"""What the user sees: stage lines, progress bars, tables. The only place that prints.

Progress goes to standard error, results to standard output, so that `-o json` stays clean.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from .progress import Progress, TimeLeft

PLAIN_INTERVAL = 15.0  # seconds between progress lines where there is no terminal

# soft_wrap: rich breaks long lines itself otherwise, and a path or a command that was broken cannot
# be copied. No highlight: it would colour numbers and quotes in users' own texts.
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def line(text: str, style: str | None = None) -> None:
    """Print a line of a result on standard output; square brackets are text, not rich's markup."""
    out.print(text, markup=False, style=style)


def print_json(value: Any) -> None:
    """Print `value` as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def show(output: str, value: Any, *lines: str) -> int:
    """Print a result: `value` with `-o json`, else the lines. Returns exit status 0."""
    if output == "json":
        print_json(value)
    else:
        for text in lines:
            line(text)
    return 0


def print_error(message: str) -> None:
    """Print an error for the user, on standard error."""
    err.print("Error:", style="bold red", end=" ")
    err.print(message, markup=False)


def stage_done(title: str, text: str, seconds: float | None, *, good: bool = True) -> None:
    """One line for a finished stage; `seconds` None means that it was done before.

    `good` False: it was finished, and found that something is not as it should be.
    """
    took = "already done" if seconds is None else f"{seconds:.1f} s"
    mark = "[green]✓[/]" if good else "[bold red]✗[/]"
    err.print(f"{mark} [bold]{title:<10}[/] ", end="")
    err.print(text, markup=False, end="")
    err.print(f"  [dim]{took}[/]")


def stage_left_out(title: str, why: str) -> None:
    """One line for a stage that cannot be done here and that the others do not need."""
    err.print(f"[dim]–[/] [bold]{title:<10}[/] ", end="")
    err.print(f"left out: {why}", markup=False)


def note(text: str) -> None:
    """A line under a stage: a choice and its reason."""
    err.print(f"             {text}", style="dim", markup=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A moving bar on a terminal; in a log file a plain line every 15 seconds.

    Whatever is counted gets an estimate of the time left.
    """
    left = TimeLeft()
    if not err.is_terminal:
        last_shown = time.monotonic()

        def print_line(done: int, total: int, text: str) -> None:
            nonlocal last_shown
            # Outside the condition: the estimate needs every count.
            estimate = left.after(done, total)
            if time.monotonic() - last_shown >= PLAIN_INTERVAL:
                last_shown = time.monotonic()
                share = f"{done}/{total} " if total else ""
                for part in ", ".join(filter(None, (text, estimate))).splitlines() or [""]:
                    err.print(f"  {title:<10} {share}{part}", markup=False)

        yield print_line
        return
    with Bars(
        SpinnerColumn(),
        TextColumn(f"[bold]{title:<10}[/]"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,  # the stage's own line takes its place
    ) as bars:
        task = bars.add_task("", total=None)

        def update(done: int, total: int, text: str) -> None:
            shown = ", ".join(filter(None, (text, left.after(done, total))))
            bars.update(task, completed=done, total=total or None, description=escape(shown))

        yield update


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a small table on standard output."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        drawn.add_column(column, justify="left" if position == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    out.print(drawn, soft_wrap=False)  # cells wrap on a narrow terminal, they are not cut off
