"""What a search found: report.json, a picture, and the best recipe ready to run.

Writes run/search/{report.json,report.svg,best.yaml}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..errors import StageError
from ..journey import Journey
from ..run import write_atomically
from .plan import Choices, MakeRecipe, SearchPlan, Value, overrides_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.gridspec import SubplotSpec

_TRIAL, _BEST = "#4a7fb5", "#d1632b"


@dataclass(frozen=True)
class Finished:
    """The outcome of a trial; `value` is None where it was pruned or failed."""

    number: int
    state: str  # complete, pruned or fail
    value: float | None
    parameters: Mapping[str, Value]
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


def draw(plan: SearchPlan, trials: Sequence[Finished], best: Finished, path: Path) -> None:
    """Write the picture: the figure trial by trial, then against each parameter.

    Trials without a figure are crosses at the foot of the first panel.
    """
    import matplotlib as mpl  # mlflow brings it; a second to import
    from matplotlib.figure import Figure

    measured = [trial for trial in trials if trial.value is not None]
    lost = [trial.number for trial in trials if trial.value is None]
    values = [trial.value for trial in measured if trial.value is not None]
    rows = 1 + (len(plan.parameters) + 1) // 2
    figure = Figure(figsize=(9, 3 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)

    def panel(place: SubplotSpec, title: str, at: Sequence[float]) -> Axes:
        axes = figure.add_subplot(place, title=title)
        chosen = measured.index(best)
        axes.scatter(at, values, color=_TRIAL, alpha=0.75, gid=f"trials of {title}")
        axes.scatter(at[chosen], values[chosen], color=_BEST, gid=f"best of {title}", zorder=3)
        return axes

    title = f"{plan.metric}, trial by trial ({plan.direction})"
    numbers = [trial.number for trial in measured]
    history = panel(grid[0, :], title, numbers)
    so_far = accumulate(values, max if plan.direction == "maximize" else min)
    history.plot(numbers, list(so_far), color=_BEST)
    history.plot(lost, [0] * len(lost), "x", color="gray", transform=history.get_xaxis_transform())
    for place, (key, parameter) in enumerate(plan.parameters.items()):
        given = [trial.parameters[key] for trial in measured]
        if isinstance(parameter, Choices):  # compared as JSON: in Python 1, 1.0 and true are equal
            names = [json.dumps(choice) for choice in parameter.choices]
            at = [names.index(json.dumps(value)) for value in given]
            panel(grid[1 + place // 2, place % 2], key, at).set_xticks(range(len(names)), names)
        else:
            figures = [value for value in given if isinstance(value, (int, float))]
            panel(grid[1 + place // 2, place % 2], key, figures).set_xscale(
                "log" if parameter.log else "linear"
            )
    # Text stays text, and nothing names the day: the same trials make the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "phi3"}):
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def write_report(
    journey: Journey, plan: SearchPlan, make: MakeRecipe, trials: Sequence[Finished]
) -> dict[str, object]:
    """Write the three files; the content of report.json.

    Raises StageError when no trial came to a figure.
    """
    best = best_of(trials, maximize=plan.direction == "maximize")
    if best is None:
        remarks = [f"  {trial.folder}: {trial.remark}" for trial in trials]
        raise StageError("No trial produced a result:\n" + "\n".join(remarks))
    folder = journey.run.path / "search"
    header = (
        f"# Trial {best.number}, the best of {len(trials)}: {plan.metric} {best.value:.5g} "
        f"({plan.direction}).\n# Run:  phi3 up THIS_FILE\n"
    )
    # What the recipe says, not what it leaves to the defaults; paths are absolute.
    recipe = make(overrides_of(best.parameters)).model_dump(mode="json", exclude_unset=True)
    recipe["name"] = f"{journey.run.name[:59]}-best"  # a run of its own, next to the searched one
    body = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    write_atomically(folder / "best.yaml", header + body)
    draw(plan, trials, best, folder / "report.svg")
    content: dict[str, object] = {
        "metric": plan.metric,
        "direction": plan.direction,
        "best": {**asdict(best), "folder": best.folder},
        "best_recipe": "search/best.yaml",
        "picture": "search/report.svg",
        "trials": [{**asdict(trial), "folder": trial.folder} for trial in trials],
    }
    write_atomically(folder / "report.json", json.dumps(content, indent=2) + "\n")
    return content
