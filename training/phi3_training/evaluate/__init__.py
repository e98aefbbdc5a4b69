"""Asks the base and the tuned model the same questions and counts the right answers.

Reads run/data/*.jsonl and both models; writes run/evaluate/rows.jsonl.
"""

from __future__ import annotations

from ..manifests import MetricsManifest
from ..progress import Progress, no_progress
from ..recipe import Recipe
from ..run import Run


def evaluate(recipe: Recipe, run: Run, progress: Progress = no_progress) -> MetricsManifest:
    """Score both models; the manifest with `before` and `after`."""
    from . import compare

    return compare.evaluate(recipe, run, progress)
