"""The page of a comparison: one self-contained HTML file, in the style of the evaluation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from .. import evaluate
from .recommend import RULES

_SHOWN = 15  # wrong answers side by side


def page(name: str, figures: Mapping[str, Any], worst: Sequence[Mapping[str, Any]]) -> str:
    """The page of the run `name`; `figures` as in comparison.json."""
    folders = [Path(__file__).parent, Path(evaluate.__file__).parent]
    # What models, people and documents wrote is text, never markup.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, keep_trailing_newline=True
    )
    environment.filters["form"] = format
    rule = next(r for r in RULES if r.name == figures["recommendation"]["rule"])
    return environment.get_template("comparison.html").render(
        name=name, f=figures, arms=figures["arms"], rule=rule, worst=worst, shown=_SHOWN
    )
