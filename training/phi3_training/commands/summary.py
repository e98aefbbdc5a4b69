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
    "validation": ("contains", "exact_match", "token_f1"),
    "train": ("contains", "exact_match"),
    "replay": ("contains", "exact_match"),
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
    console.out.print(f"After:    {answer['answer']}", markup=False, style="bold green")
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
    sure = f"change, {confidence:.0%} sure"
    if every:
        for part, compared in metrics["comparisons"].items():
            title = f"{_title(part, compared)}, before and after tuning"
            console.table(title, ["", "before", "after", sure], _rows(compared))
    else:
        rows = [
            [_title(part, compared) if not number else "", *row]
            for part, compared in metrics["comparisons"].items()
            for number, row in enumerate(_rows(compared, HEADLINES[part]))
        ]
        console.table(
            "Before and after tuning, as measured", ["asked", "", "before", "after", sure], rows
        )
    console.out.print(f"Gate:     {gate.summary(verdict)}", markup=False)
    if every or not verdict["passed"]:
        for rule in verdict["rules"]:
            console.out.print(f"  {gate.line(rule)}", markup=False)
        for text in verdict.get("remarks", []):
            console.out.print(f"  {text}", markup=False)
    console.out.print(f"Report:   {_shown(run.path / verdict['report'])}", markup=False)


def _title(part: str, compared: dict[str, Any]) -> str:
    from ..evaluate.questions import PARTS

    return f"{next(iter(compared.values()))['rows']} {PARTS[part]}"


def _rows(compared: dict[str, Any], wanted: tuple[str, ...] | None = None) -> list[list[str]]:
    from ..evaluate.figures import METRICS

    rows = []
    for name, figures in compared.items():
        if wanted is None or name in wanted:
            metric = METRICS[name]
            before, after = (format(figures[side], metric.form) for side in ("before", "after"))
            low, high = (format(figures[end], "+" + metric.form) for end in ("low", "high"))
            rows.append([metric.label, before, after, f"{low} to {high}"])
    return rows


def _shown(path: Path) -> str:
    """A path under the current folder without that folder's own part."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _next_steps(journey: Journey) -> list[tuple[str, str]]:
    if journey.target.name != "local":
        return _next_on(journey.target.name, journey.run.name)
    flow = os.path.relpath(journey.flow)
    binary = _prefix()
    return [
        (f"{binary}phi3 chat", "a conversation in this terminal"),
        (
            f"{binary}phi3 chat --web",
            "Prompt flow's chat page in the browser; Ctrl-C ends it",
        ),
        (
            f'{binary}pf flow test --flow {flow} --inputs input_data="{journey.recipe.ask}"',
            "one question through the flow",
        ),
    ]


def _next_on(target: str, run: str) -> list[tuple[str, str]]:
    where = f"--on {target} --run {run}"
    binary = _prefix()
    return [
        (f"{binary}phi3 chat {where}", "a conversation in this terminal"),
        (f"{binary}phi3 invoke {where}", "a held-out conversation, scored"),
        (f"{binary}phi3 status {where}", "what stands, and what bills"),
        (f"{binary}phi3 down --on {target} {run}", "delete what bills: until then it does"),
    ]


def _prefix() -> str:
    """`.venv/bin/` where the commands are not on the PATH as the user's shell sees it."""
    here = Path(sys.executable).parent
    on_path = str(here) in os.environ.get("PATH", "").split(os.pathsep)
    return "" if on_path else f"{os.path.relpath(here)}/"
