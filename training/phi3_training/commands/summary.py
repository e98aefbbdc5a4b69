"""What a finished `phi3 up` shows: before and after, the answer, and what to type next."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .. import console
from ..journey import Journey
from ..run import Run

# What `phi3 up` shows of each part; `phi3 evaluate` shows all.
HEADLINES = {
    "validation": ("exact_match", "token_f1"),
    "train": ("exact_match",),
    "replay": ("exact_match",),
    "canary": ("contains",),
    "probes": ("refusal_rate",),
}


def show_summary(journey: Journey) -> None:
    """Print the figures and the answer of a finished run."""
    metrics = journey.run.require("metrics", "phi3 evaluate")
    console.out.print()
    show_comparison(journey.run)
    answer = journey.run.require("answer", "phi3 up")
    console.out.print()
    console.out.print(f"You ask:  {answer['question']}", markup=False)
    before = metrics.get("ask", {})
    if before.get("question") == answer["question"]:
        console.out.print(f"Before:   {before['before'] or '(nothing)'}", markup=False)
    console.out.print(f"Phi-3:    {answer['answer']}", markup=False, style="bold green")
    console.out.print()
    console.out.print("Next, type:", style="bold")
    for command, why in _next_steps(journey):
        console.out.print(f"  {command}", markup=False)
        console.out.print(f"      {why}", markup=False, style="dim")


def show_comparison(run: Run, *, every: bool = False) -> None:
    """Both models' figures side by side, where the report lies, and the gate's verdict."""
    from ..evaluate import gate

    metrics = run.require("metrics", "phi3 evaluate")
    verdict = run.require("gate", "phi3 evaluate")
    confidence = metrics["settings"]["confidence"]
    rows = [
        row
        for part, compared in metrics["comparisons"].items()
        for row in _rows(part, compared, None if every else HEADLINES[part])
    ]
    heads = ["questions", "count", "figure", "before", "after", f"change, {confidence:.0%} sure"]
    console.table("The base and the tuned model, as measured", heads, rows)
    console.out.print(f"Gate:     {gate.summary(verdict)}", markup=False)
    if every or not verdict["passed"]:
        for rule in verdict["rules"]:
            console.out.print(f"  {gate.line(rule)}", markup=False)
    console.out.print(f"Report:   {_shown(run.path / verdict['report'])}", markup=False)


def _rows(part: str, compared: dict[str, Any], wanted: tuple[str, ...] | None) -> list[list[str]]:
    from ..evaluate.figures import METRICS
    from ..evaluate.questions import PARTS

    found = []
    for name, figures in compared.items():
        if wanted is not None and name not in wanted:
            continue
        form = METRICS[name].form
        low, high = (format(figures[end], "+" + form) for end in ("low", "high"))
        found.append(
            [
                "" if found else PARTS[part],
                "" if found else str(figures["rows"]),
                METRICS[name].label,
                format(figures["before"], form),
                format(figures["after"], form),
                f"{low} to {high}",
            ]
        )
    return found


def _shown(path: Path) -> str:
    """A path under the current folder without that folder's own part."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _next_steps(journey: Journey) -> list[tuple[str, str]]:
    flow = os.path.relpath(journey.flow)
    binary = _prefix()
    return [
        (f"{binary}phi3 chat", "a conversation in this terminal"),
        (
            f"{binary}pf flow test --flow {flow} --ui",
            "Prompt flow's chat page in the browser; Ctrl-C ends it",
        ),
        (
            f'{binary}pf flow test --flow {flow} --inputs input_data="{journey.recipe.ask}"',
            "one question through the flow",
        ),
    ]


def _prefix() -> str:
    """`.venv/bin/` where the commands are not on the PATH as the user's shell sees it."""
    here = Path(sys.executable).parent
    on_path = str(here) in os.environ.get("PATH", "").split(os.pathsep)
    return "" if on_path else f"{os.path.relpath(here)}/"
