"""What a search found: report.json, a picture, and the best recipe ready to run.

Writes run/search/{report.json,report.svg,best.yaml}.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import StageError
from ..journey import Journey
from ..recipe import Recipe
from ..run import write_atomically
from .plan import Choices, MakeRecipe, SearchPlan, overrides_of

if TYPE_CHECKING:
    pass  # MERGE-EMPTY


# The search as one SVG: each trial's figure in turn, then the figure against each parameter.
# Pure functions; the picture is self-contained and has a light and a dark theme.

_WIDE, _PANEL, _HIGH, _GAP = 720, 348, 220, 24
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 34, 30
_STYLE = """
text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600}
.frame{fill:none;stroke:#bbb}.trial{fill:#4a7fb5;fill-opacity:.75}.best{fill:#d1632b}
.sofar{fill:none;stroke:#d1632b;stroke-width:1.5}.lost{stroke:#999;stroke-width:1.5}
@media(prefers-color-scheme:dark){text{fill:#ddd}.frame{stroke:#666}}
"""


class _Panel:
    """A frame at a place, with its own scales."""

    def __init__(self, x: float, y: float, width: float, title: str) -> None:
        self.left, self.right = x + _LEFT, x + width - _RIGHT
        self.top, self.bottom = y + _TOP, y + _HIGH - _BOTTOM
        self.parts = [
            f'<text class="title" x="{self.left}" y="{y + 20}">{html.escape(title)}</text>',
            f'<path class="frame" d="M{self.left} {self.top}V{self.bottom}H{self.right}"/>',
        ]

    def x(self, share: float) -> float:
        return self.left + 8 + (self.right - self.left - 16) * share

    def y(self, share: float) -> float:
        return self.bottom - 8 - (self.bottom - self.top - 16) * share

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
        )

    def dot(self, x: float, y: float, told: str, *, best: bool) -> None:
        kind, size = ("best", 5.5) if best else ("trial", 4)
        self.parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">'
            f"<title>{html.escape(told)}</title></circle>"
        )


def draw(plan: SearchPlan, trials: Sequence[Finished], best: Finished) -> str:
    """The whole picture; trials without a figure are crosses at the foot of the first panel."""
    values = [trial.value for trial in trials if trial.value is not None]
    height = _scale(min(values), max(values), log=False)
    panels = [_history(plan, trials, best, height)]
    for number, key in enumerate(plan.parameters):
        x = (number % 2) * (_PANEL + _GAP)
        y = (1 + number // 2) * (_HIGH + _GAP)
        panels.append(_scatter(plan, key, trials, best, height, x, y))
    for panel in panels:
        panel.text(panel.left - 6, panel.y(0) + 4, f"{min(values):.4g}", "end")
        panel.text(panel.left - 6, panel.y(1) + 4, f"{max(values):.4g}", "end")
    total = (1 + math.ceil(len(plan.parameters) / 2)) * (_HIGH + _GAP)
    told = f"{plan.metric} of {len(trials)} trials; best: {best.value:.4g}"
    drawn = "".join(part for panel in panels for part in panel.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {total}" role="img" '
        f'aria-label="{html.escape(told)}"><style>{_STYLE}</style>{drawn}</svg>\n'
    )


def _history(
    plan: SearchPlan, trials: Sequence[Finished], best: Finished, height: Callable[[float], float]
) -> _Panel:
    panel = _Panel(0, 0, _WIDE, f"{plan.metric}, trial by trial ({plan.direction})")
    along = _scale(1, max(2, len(trials)), log=False)
    choose = max if plan.direction == "maximize" else min
    best_so_far: list[str] = []
    leader: float | None = None
    for trial in trials:
        x = panel.x(along(trial.number))
        if trial.value is None:
            y = panel.bottom
            cross = f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
            panel.parts.append(
                f'<path class="lost" d="{cross}"><title>{trial.state}</title></path>'
            )
            continue
        leader = trial.value if leader is None else choose(leader, trial.value)
        best_so_far.append(f"{x:.1f},{panel.y(height(leader)):.1f}")
        panel.dot(x, panel.y(height(trial.value)), _told(trial), best=trial is best)
    panel.parts.insert(2, f'<polyline class="sofar" points="{" ".join(best_so_far)}"/>')
    panel.text(panel.x(0), panel.bottom + 18, "1", "middle")
    panel.text(panel.x(1), panel.bottom + 18, str(len(trials)), "middle")
    return panel


def _scatter(
    plan: SearchPlan,
    key: str,
    trials: Sequence[Finished],
    best: Finished,
    height: Callable[[float], float],
    x: float,
    y: float,
) -> _Panel:
    panel = _Panel(x, y, _PANEL, key)
    parameter = plan.parameters[key]
    if isinstance(parameter, Choices):
        marks: list[Any] = parameter.choices
        place = _places(parameter.choices)
    else:
        marks = [parameter.low, parameter.high]
        place = _scale(parameter.low, parameter.high, log=parameter.log)
    for value in marks:
        panel.text(panel.x(place(value)), panel.bottom + 18, _short(value), "middle")
    for trial in trials:
        if trial.value is not None:
            at = panel.x(place(trial.parameters[key]))
            panel.dot(at, panel.y(height(trial.value)), _told(trial), best=trial is best)
    return panel


def _places(choices: Sequence[Any]) -> Callable[[Any], float]:
    """Choices side by side; distinguished as JSON, because 1, 1.0 and true are equal."""
    share = {json.dumps(value): i / (len(choices) - 1) for i, value in enumerate(choices)}
    return lambda value: share[json.dumps(value)]


def _scale(low: float, high: float, *, log: bool) -> Callable[[float], float]:
    """Where a value is between both, 0 to 1; in the middle if both are equal."""
    if high <= low:
        return lambda _value: 0.5
    if log:
        return lambda value: math.log(value / low) / math.log(high / low)
    return lambda value: (value - low) / (high - low)


def _told(trial: Finished) -> str:
    settings = ", ".join(f"{key}={_short(value)}" for key, value in trial.parameters.items())
    return f"trial {trial.number}: {trial.value:.5g} ({settings})"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:18]


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
        raise StageError("No trial produced a result:\n" + "\n".join(remarks))
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
