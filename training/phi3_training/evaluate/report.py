"""The report of an evaluation: one HTML page that needs nothing else, for a browser or a mail.

Reads the manifests `model`, `metrics` and the verdict of the gate, run/evaluate/rows.jsonl and the
loss log; writes run/evaluate/report.html.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..run import Run, write_atomically
from .figures import METRICS, Row
from .gate import summary
from .questions import PARTS
from .rows import read_rows
from .svg import Bar, before_after, loss_curve

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
    ("probes", "refusal_rate", "refused of what to refuse"),
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
        _section("What was lost", _worst(rows, "replay", "token_f1", only_losses=True)),
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
        f"<p>Whiskers and ranges: {settings['confidence']:.0%} intervals of a paired bootstrap, "
        f"{settings['resamples']} resamples of the rows, seed {settings['seed']}.</p>"
    )


def _table(part: str, figures: Mapping[str, Any], confidence: float) -> str:
    lines = []
    for name, c in figures.items():
        metric = METRICS[name]
        gain = metric.sign * c["change"]
        surely = c["low"] > 0 or c["high"] < 0
        kind = "" if metric.better == "neither" or not surely else "up" if gain > 0 else "down"
        cells = (format(c[key], metric.form) for key in ("before", "after"))
        change, low, high = (format(c[key], "+" + metric.form) for key in ("change", "low", "high"))
        lines.append(
            f"<tr><th>{metric.label}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f'<td class="{kind}">{change}</td><td>{low} … {high}</td></tr>'
        )
    count = next(iter(figures.values()))["rows"]
    return (
        f"<h3>{count} {PARTS[part]}</h3>\n<table><thead><tr><th></th><th>before</th>"
        f"<th>after</th><th>change</th><th>{confidence:.0%} interval</th></tr></thead>"
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
    head = f"<p>{len(changed)} of {len(probes)} answers changed between refusing and not.</p>"
    return head + "".join(_side_by_side(row) for row in (changed or probes[:3])[:_WORST])
