"""What a finished `phi3 up` shows: before and after, the answer, and what to type next."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .. import console
from ..journey import Journey

PARTS = {
    "validation": "held-out paraphrases (never trained on)",
    "train": "questions it was fine-tuned on",
    "replay": "what it knew before",
}


def show_summary(journey: Journey) -> None:
    """Print the figures and the answer of a finished run."""
    metrics = journey.run.require("metrics", "phi3 evaluate")
    answer = journey.run.require("answer", "phi3 up")
    console.out.print()
    console.table(
        "Exact match of the answers, as measured",
        ["questions", "count", "before tuning", "after"],
        [_row(part, metrics) for part in metrics["after"]],
    )
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


def _row(part: str, metrics: dict[str, Any]) -> list[str]:
    before, after = metrics["before"][part], metrics["after"][part]
    return [
        PARTS.get(part, part),
        str(after["rows"]),
        f"{before['exact_match']:.1%}",
        f"{after['exact_match']:.1%}",
    ]


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
