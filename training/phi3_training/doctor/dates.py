"""What this environment depends on and that ends soon, or has ended; never a fault."""

from __future__ import annotations

from collections.abc import Iterator

from .. import sunset
from .finding import Finding, Group

DATES = Group("dates")


def dates() -> Iterator[Finding]:
    """A warning for each end that is near or past; one line that says so when there is none."""
    day = sunset.today()
    rows = sunset.due(day)
    for row in rows:
        yield DATES.warning("ends", row.said(day), row.cure)
    if not rows:
        yield DATES.ok(
            "ends",
            f"nothing that is used here ends within {sunset.WITHIN} days of {day}; "
            "all dates: phi3 doctor --dates",
        )
