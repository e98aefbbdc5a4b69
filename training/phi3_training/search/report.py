"""What a search found: report.json, a picture, and the best recipe ready to run.

Writes run/search/{report.json,report.svg,best.yaml}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from ..errors import StageError
from ..journey import Journey
from ..recipe import Recipe
from ..run import write_atomically
from .picture import draw
from .plan import MakeRecipe, SearchPlan, overrides_of


@dataclass(frozen=True)
class Finished:
    """What came of a trial; `value` is None where it was ended early or failed."""

    number: int
    state: str  # complete, pruned or fail
    value: float | None
    parameters: Mapping[str, Any]
    seconds: float | None
    remark: str | None

    @property
    def folder(self) -> str:
        """The trial's run folder inside the whole run."""
        return f"search/trials/trial-{self.number:03d}"


def best_of(trials: Sequence[Finished], *, maximize: bool) -> Finished | None:
    """The first of the best trials; None where none came to a figure."""
    sign = -1.0 if maximize else 1.0
    measured = [(sign * t.value, t.number, t) for t in trials if t.value is not None]
    return min(measured)[2] if measured else None


def write_report(
    journey: Journey, plan: SearchPlan, make: MakeRecipe, trials: Sequence[Finished]
) -> dict[str, Any]:
    """Write the three files; the content of report.json.

    Raises StageError when no trial came to a figure.
    """
    best = best_of(trials, maximize=plan.direction == "maximize")
    if best is None:
        remarks = [f"  {trial.folder}: {trial.remark}" for trial in trials]
        raise StageError("No trial came to a figure:\n" + "\n".join(remarks))
    folder = journey.run.path / "search"
    recipe = make(overrides_of(best.parameters))
    write_atomically(folder / "best.yaml", _header(plan, best, len(trials)) + _as_yaml(recipe))
    write_atomically(folder / "report.svg", draw(plan, trials, best))
    content = {
        "metric": plan.metric,
        "direction": plan.direction,
        "best": {**asdict(best), "folder": best.folder},
        "best_recipe": "search/best.yaml",
        "picture": "search/report.svg",
        "trials": [{**asdict(trial), "folder": trial.folder} for trial in trials],
    }
    write_atomically(folder / "report.json", json.dumps(content, indent=2) + "\n")
    return content


def _header(plan: SearchPlan, best: Finished, count: int) -> str:
    return (
        f"# Trial {best.number}, the best of {count}: {plan.metric} {best.value:.5g} "
        f"({plan.direction}).\n# Run:  phi3 up THIS_FILE\n"
    )


def _as_yaml(recipe: Recipe) -> str:
    """What the recipe says, not what it leaves to the defaults; paths are absolute."""
    content = recipe.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
