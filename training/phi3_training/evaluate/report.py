"""The report of an evaluation: one self-contained HTML page, for a browser or an e-mail.

Reads the manifests `model`, `metrics` and the verdict of the gate, run/evaluate/rows.jsonl and the
loss log; writes run/evaluate/report.html from the template report.html.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ..manifests import GateManifest, MetricsManifest, ModelManifest
from ..run import Run, write_atomically
from .figures import METRICS
from .gate import summary
from .questions import PARTS
from .rows import Row, read_rows

PATH = "evaluate/report.html"
_SHOWN = 12  # answers side by side in each section
_SMOOTHED = 25  # the mean curve's window is this fraction of the steps

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


def write(run: Run, verdict: GateManifest) -> str:
    """Write the page; its path inside the run folder."""
    metrics, model = run.require(MetricsManifest), run.require(ModelManifest)
    rows = read_rows(run)
    losses: list[float] = []
    path = run.path / (model.loss_log or "finetune/loss.jsonl")
    if path.is_file():  # not of a model that another tool tuned
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        losses = [float(line["loss"]) for line in lines if line.get("loss") is not None]
    # What models and people wrote is text, never markup.
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        keep_trailing_newline=True,
    )
    page.filters["form"] = format
    comparisons = metrics.comparisons
    bars = [(label, comparisons.get(part, {}).get(key)) for part, key, label in _BARS]
    probes = [row for row in rows if row["part"] == "probes"]
    # The loss of each step and its moving mean, on a logarithmic scale of whole powers of ten.
    # A loss of 0 has no logarithm: a model that knows its few rows by heart comes near it.
    logs = [math.log10(max(loss, 1e-6)) for loss in losses] or [0.0]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)
    window = max(1, len(logs) // _SMOOTHED)
    parts = [logs[max(0, end - window) : end] for end in range(1, len(logs) + 1)]
    content = page.get_template("report.html").render(
        name=run.name,
        model=model,
        verdict=verdict,
        outcome=summary(verdict),
        bars=[(label, c) for label, c in bars if c is not None],
        share=lambda value: min(1.0, max(0.0, value)),
        settings=metrics.settings,
        losses=losses,
        powers=range(low, high + 1),
        height=lambda log: (high - log) / (high - low),
        curves=[("each", logs), ("mean", [sum(part) / len(part) for part in parts])],
        comparisons=comparisons,
        metrics=METRICS,
        parts=PARTS,
        worst=[
            ("Worst held-out answers, side by side", _worst(rows, "validation")),
            ("Answers that got worse", _worst(rows, "replay", lost=True)),
        ],
        probes=probes,
        changed=[
            row
            for row in probes
            if row["before_scores"]["refusal_rate"] != row["after_scores"]["refusal_rate"]
        ],
        shown=_SHOWN,
    )
    write_atomically(run.path / PATH, content)
    return PATH


def _worst(rows: Sequence[Row], part: str, *, lost: bool = False) -> list[Row]:
    """The wrong answers of a part, worst first; `lost`: only those the base model gave better."""
    key = "token_f1"
    wrong = [row for row in rows if row["part"] == part and not row["after_right"]]
    if lost:
        wrong = [row for row in wrong if row["after_scores"][key] < row["before_scores"][key]]
    return sorted(wrong, key=lambda row: float(row["after_scores"][key]))
