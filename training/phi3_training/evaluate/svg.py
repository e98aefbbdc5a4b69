"""Pictures of the report as inline SVG: a loss curve, and bars with intervals. Pure functions.

Colours are CSS variables of the page, so that they follow its light and dark dress.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34
_ROW = 64
_LABELS = 210
_BAR = 16
_SMOOTHED = 25  # points of the drawn mean curve's window divide the steps by this


@dataclass(frozen=True)
class Bar:
    """A share (0 to 1) with its interval."""

    value: float
    low: float
    high: float


def loss_curve(losses: Sequence[float]) -> str:
    """Loss of each step, pale, and its moving mean; the scale is logarithmic."""
    if len(losses) < 2:
        return "<p>No loss was logged.</p>"
    logs = [math.log10(max(loss, 1e-6)) for loss in losses]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)

    def point(step: float, log: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / (len(losses) - 1)
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - log) / (high - low)
        return f"{x:.1f},{y:.1f}"

    mean = _moving_mean(logs, max(1, len(logs) // _SMOOTHED))
    parts = [_grid_line(power, low, high) for power in range(low, high + 1)]
    for kind, values in (("each", logs), ("mean", mean)):
        line = " ".join(point(step, log) for step, log in enumerate(values))
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
    base = _HEIGHT - _BOTTOM + 20
    parts.append(f'<text x="{_LEFT}" y="{base}">step 1</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{base}" text-anchor="end">step {len(losses)}</text>'
    )
    told = f"Training loss from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    return _drawing("loss", _HEIGHT, told, parts)


def before_after(rows: Sequence[tuple[str, Bar, Bar]]) -> str:
    """Two bars for each labelled row, before above after, with whiskers for the intervals."""
    parts = []
    for number, (label, before, after) in enumerate(rows):
        top = number * _ROW + 8
        middle = top + _BAR + 5
        parts.append(
            f'<text x="{_LABELS - 12}" y="{middle}" text-anchor="end">{html.escape(label)}</text>'
        )
        parts += _bar("before", before, top)
        parts += _bar("after", after, top + _BAR + 2)
    told = "; ".join(f"{label}: {b.value:.1%} before, {a.value:.1%} after" for label, b, a in rows)
    return _drawing("bars", len(rows) * _ROW, told, parts)


def _bar(kind: str, bar: Bar, top: int) -> list[str]:
    room = _WIDTH - _LABELS - 70
    end, low, high = (
        _LABELS + room * min(1.0, max(0.0, x)) for x in (bar.value, bar.low, bar.high)
    )
    middle = top + _BAR / 2
    beside = f'x="{max(end, high) + 8:.1f}" y="{middle + 4}"'
    return [
        f'<rect class="{kind}" x="{_LABELS}" y="{top}" width="{max(1.0, end - _LABELS):.1f}" '
        f'height="{_BAR}" rx="2"/>',
        f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8'
        f'M{high:.1f} {middle - 4}v8"/>',
        f'<text class="figure" {beside}>{bar.value:.1%}</text>',
    ]


def _grid_line(power: int, low: int, high: int) -> str:
    y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - power) / (high - low)
    return (
        f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
    )


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    found = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        found.append(sum(part) / len(part))
    return found


def _drawing(kind: str, height: int, told: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{html.escape(told)}">{"".join(parts)}</svg>'
    )
