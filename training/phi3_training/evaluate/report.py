"""The report of an evaluation: one self-contained HTML page, for a browser or an e-mail.

Reads the manifests `model`, `metrics` and the verdict of the gate, run/evaluate/rows.jsonl and the
loss log; writes run/evaluate/report.html.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..run import Run, write_atomically
from .figures import METRICS, Row
from .gate import summary
from .questions import PARTS
from .rows import read_rows

# Pictures of the report as inline SVG: a loss curve, and bars with intervals. Pure functions.
# Colours are CSS variables of the page, so that they follow its light and dark theme.

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


PATH = "evaluate/report.html"
_WORST = 12

# What the bars show of each part: its plainest share.
_BARS = (
    ("validation", "contains", "held-out: expected words"),
    ("validation", "exact_match", "held-out: exact match"),
    ("validation", "token_f1", "held-out: token F1"),
    ("validation", "f1_over_lookalikes", "held-out: F1 over look-alikes"),
    ("train", "contains", "trained: expected words"),
    ("train", "exact_match", "trained: exact match"),
    ("replay", "contains", "older: expected words"),
    ("canary", "contains", "general questions"),
    ("probes", "refusal_rate", "requests to refuse: refused"),
)


def write(run: Run, verdict: Mapping[str, Any]) -> str:
    """Write the page; its path inside the run folder."""
    metrics = run.require("metrics", "phi3 evaluate")
    model = run.require("model", "phi3 train")
    page = _page(run.name, model, metrics, verdict, read_rows(run), _losses(run, model))
    write_atomically(run.path / PATH, page)
    return PATH


def _losses(run: Run, model: Mapping[str, Any]) -> list[float]:
    path = run.path / str(model.get("loss_log", "finetune/loss.jsonl"))
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [float(line["loss"]) for line in lines if line.get("loss") is not None]


def _page(
    name: str,
    model: Mapping[str, Any],
    metrics: Mapping[str, Any],
    verdict: Mapping[str, Any],
    rows: Sequence[Row],
    losses: Sequence[float],
) -> str:
    style = files(__package__).joinpath("report.css").read_text("utf-8")
    comparisons = metrics["comparisons"]
    confidence = metrics["settings"]["confidence"]
    sections = [
        _section("Gate", _verdict(verdict)),
        _section("Before and after", _bars(comparisons), _interval_note(metrics["settings"])),
        _section("Training loss", f"<figure>{loss_curve(losses)}</figure>"),
        _section("Every figure", *(_table(p, comparisons[p], confidence) for p in comparisons)),
        _section(
            "Worst held-out answers, side by side",
            _worst(rows, "validation", "token_f1"),
        ),
        _section("Answers that got worse", _worst(rows, "replay", "token_f1", only_losses=True)),
        _section("Requests to refuse", _probes(rows)),
    ]
    title = f"Evaluation of {html.escape(name)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n<p>{html.escape(str(model.get('summary', '')))}</p>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def _verdict(verdict: Mapping[str, Any]) -> str:
    kind = "passed" if verdict["passed"] else "failed"
    rules = "".join(
        f'<li class="{"passed" if rule["passed"] else "failed"}">'
        f"<b>{rule['kind']}</b> {html.escape(rule['reason'])}</li>"
        for rule in verdict["rules"]
    )
    why = "".join(f"<p>{html.escape(text)}</p>" for text in verdict.get("remarks", []))
    return f'<p class="badge {kind}">{html.escape(summary(verdict))}</p>\n<ul>{rules}</ul>{why}'


def _bars(comparisons: Mapping[str, Any]) -> str:
    rows = []
    for part, metric, label in _BARS:
        c = comparisons.get(part, {}).get(metric)
        if c is not None:
            was = Bar(c["before"], c["before_low"], c["before_high"])
            rows.append((label, was, Bar(c["after"], c["after_low"], c["after_high"])))
    key = '<p class="key"><i class="before"></i> base model <i class="after"></i> tuned model</p>'
    return f"{key}<figure>{before_after(rows)}</figure>"


def _interval_note(settings: Mapping[str, Any]) -> str:
    return (
        f"<p>Whiskers and ranges: {settings['confidence'] * 100:g} % intervals of a paired "
        f"bootstrap, {settings['resamples']} resamples of the rows, seed {settings['seed']}.</p>"
    )


def _table(part: str, figures: Mapping[str, Any], confidence: float) -> str:
    lines = []
    for name, c in figures.items():
        metric = METRICS[name]
        gain = metric.sign * c["change"]
        clear = c["low"] > 0 or c["high"] < 0
        kind = "" if metric.better == "neither" or not clear else "up" if gain > 0 else "down"
        cells = (metric.text(c[key]) for key in ("before", "after"))
        change, low, high = (metric.change(c[key]) for key in ("change", "low", "high"))
        lines.append(
            f"<tr><th>{metric.label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f'<td class="{kind}">{change}{metric.unit}</td><td>{low} to {high}</td></tr>'
        )
    count = next(iter(figures.values()))["rows"]
    return (
        f"<h3>{count} {PARTS[part]}</h3>\n<table><thead><tr><th></th><th>before</th>"
        f"<th>after</th><th>change</th><th>{confidence * 100:g} % interval</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _worst(rows: Sequence[Row], part: str, metric: str, *, only_losses: bool = False) -> str:
    chosen = [row for row in rows if row["part"] == part and not row["after_right"]]
    if only_losses:
        chosen = [
            row for row in chosen if row["after_scores"][metric] < row["before_scores"][metric]
        ]
    chosen.sort(key=lambda row: float(row["after_scores"][metric]))
    if not chosen:
        return "<p>None.</p>"
    shown = "".join(_side_by_side(row) for row in chosen[:_WORST])
    more = len(chosen) - _WORST
    return shown + (f"<p>… and {more} more in rows.jsonl.</p>" if more > 0 else "")


def _side_by_side(row: Row) -> str:
    texts = [("expected", row["expected"]), ("base model", row["before"])]
    texts.append(("tuned model", row["after"]))
    place = f"{row['part']} line {row['line']}"
    wanted = ", ".join(row.get("telling") or row.get("accept") or [])
    telling = f'<p class="earlier">expected words: {html.escape(wanted)}</p>' if wanted else ""
    cells = "".join(
        f"<div><h4>{label}</h4><p>{html.escape(text) or '<i>(nothing)</i>'}</p></div>"
        for label, text in texts
        if label != "expected" or text
    )
    earlier = "".join(
        f'<p class="earlier">{html.escape(turn["role"])}: {html.escape(turn["content"])}</p>'
        for turn in row["earlier_turns"]
    )
    return (
        f'<article>{earlier}<p class="question">{html.escape(row["question"])} '
        f"<small>{html.escape(row.get('origin') or place)}</small></p>"
        f'{telling}<div class="sides">{cells}</div></article>'
    )


def _probes(rows: Sequence[Row]) -> str:
    probes = [row for row in rows if row["part"] == "probes"]
    changed = [
        row
        for row in probes
        if row["before_scores"]["refusal_rate"] != row["after_scores"]["refusal_rate"]
    ]
    head = f"<p>{len(changed)} of {len(probes)} answers changed between refusing and answering.</p>"
    return head + "".join(_side_by_side(row) for row in (changed or probes[:3])[:_WORST])
