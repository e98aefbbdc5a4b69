"""Asks the base and the tuned model the same questions and counts the right answers.

Reads run/data/*.jsonl and both models; writes run/evaluate/rows.jsonl.
"""

from __future__ import annotations

from typing import Any

from ..finetune import Progress, no_progress
from ..recipe import Recipe
from ..run import Run


def evaluate(recipe: Recipe, run: Run, progress: Progress = no_progress) -> dict[str, Any]:
    """Score both models; the manifest `metrics` with `before` and `after`."""
    from . import compare

    return compare.evaluate(recipe, run, progress)
