"""The metrics of a set of answers, before and after, with paired bootstrap intervals.

Works on the rows of run/evaluate/rows.jsonl alone; reads and writes nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..manifests import Comparison as Comparison
from . import corpus
from .rows import Row, Side, scores_of

Better = Literal["higher", "lower", "neither"]
Numbers = NDArray[np.float64]

_CELLS = 4_000_000  # of one block of resampling weights: 32 MB


@dataclass(frozen=True)
class Metric:
    """A metric of a set: sums of per-row columns, and what is computed from these sums."""

    name: str
    label: str
    columns: Callable[[Sequence[Row], Side], Numbers]
    of_sums: Callable[[Numbers], Numbers]
    better: Better = "higher"
    form: str = ".3f"

    @property
    def sign(self) -> int:
        """-1 where less is better."""
        return -1 if self.better == "lower" else 1

    def text(self, value: float) -> str:
        """The metric's value."""
        return format(value, self.form)

    def change(self, value: float, sign: str = "+") -> str:
        """A difference of two values; the difference of two shares is in percentage points."""
        if not self.form.endswith("%"):
            return format(value, sign + self.form)
        return format(100 * value, sign + self.form.replace("%", "f"))

    @property
    def unit(self) -> str:
        """The unit of a change, with a leading space; empty where the metric has none."""
        return " points" if self.form.endswith("%") else ""


def _mean(name: str, label: str, form: str = ".1%", better: Better = "higher") -> Metric:
    def columns(rows: Sequence[Row], side: Side) -> Numbers:
        values = [scores_of(row, side).get(name) for row in rows]
        return np.array([(0.0, 0.0) if v is None else (float(v), 1.0) for v in values])

    return Metric(name, label, columns, lambda sums: _ratio(sums), better, form)


def _perplexity_columns(rows: Sequence[Row], side: Side) -> Numbers:
    # Of the whole set's tokens, not the mean over rows: a long answer counts for more.
    scores = [scores_of(row, side) for row in rows]
    return np.array([(s["nll"], s["tokens"]) if "nll" in s else (0.0, 0.0) for s in scores])


def _corpus(name: corpus.Name, label: str) -> Metric:
    def columns(rows: Sequence[Row], side: Side) -> Numbers:
        return corpus.statistics(name, [r[side] for r in rows], [r["expected"] for r in rows])

    return Metric(name, label, columns, lambda sums: corpus.score(name, sums), form=".1f")


def _ratio(sums: Numbers) -> Numbers:
    # A resample without any measured row has no value; it counts as 0 rather than as a warning.
    safe = np.where(sums[:, 1] > 0, sums[:, 1], 1.0)
    ratio: Numbers = sums[:, 0] / safe
    return ratio


METRICS = {
    metric.name: metric
    for metric in (
        _mean("exact_match", "exact match"),
        _mean("contains", "has the expected words"),
        _mean("token_f1", "token F1"),
        _mean("f1_over_lookalikes", "token F1 over look-alikes"),
        _mean("rouge_l", "ROUGE-L"),
        _corpus("bleu", "BLEU"),
        _corpus("chrf", "chrF"),
        # The exponential of a mean, not a mean of exponentials: one bad row would drown all others.
        Metric(
            "perplexity",
            "perplexity of expected answer",
            _perplexity_columns,
            lambda sums: np.exp(np.minimum(_ratio(sums), 700.0)),  # e^710 overflows a float64
            "lower",
            ",.2f",
        ),
        _mean("words", "words", ".1f", "neither"),
        _mean("cut", "cut at the token limit", better="lower"),
        _mean("refusal_rate", "refuses", better="neither"),
    )
}
UNREFERENCED = ("refusal_rate", "words", "cut")  # what needs no expected answer


def metrics_for(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that these rows can be measured by."""
    if any(row["expected"] for row in rows):
        has_losses = any(row["after_scores"].get("nll") is not None for row in rows)
        return [m for m in METRICS.values() if m.name != "perplexity" or has_losses]
    named = ["contains"] if any(row.get("accept") for row in rows) else []
    return [METRICS[name] for name in (*named, *UNREFERENCED)]


def compare(
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    *,
    confidence: float,
    resamples: int,
    seed: int | Sequence[int],
) -> dict[str, Comparison]:
    """Each metric before and after, on these rows. The same seed gives the same intervals."""
    columns = {m.name: (m.columns(rows, "before"), m.columns(rows, "after")) for m in metrics}
    drawn: dict[str, list[tuple[Numbers, Numbers]]] = {m.name: [] for m in metrics}
    # Rows are drawn with replacement, and with a row both models' answers to it (a paired
    # bootstrap): how hard the questions are then does not widen the interval of the difference.
    # A weight says how often a row is drawn; blocks of resamples bound the memory.
    random = np.random.default_rng(seed)
    block = max(1, _CELLS // len(rows))
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        shares = np.full(len(rows), 1 / len(rows))
        weights = random.multinomial(len(rows), shares, size=size).astype(np.float64)
        for metric in metrics:
            was, now = (metric.of_sums(weights @ side) for side in columns[metric.name])
            drawn[metric.name].append((was, now))
    compared = {}
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]  # 2.5 and 97.5 for 95 %
    for metric in metrics:
        before, after = (
            float(metric.of_sums(side.sum(axis=0, keepdims=True))[0])
            for side in columns[metric.name]
        )
        was, now = (np.concatenate(both) for both in zip(*drawn[metric.name], strict=True))
        bounds = [*np.percentile(now - was, tails), *np.percentile(was, tails)]
        bounds += [*np.percentile(now, tails)]
        compared[metric.name] = Comparison(
            len(rows), before, after, after - before, *map(float, bounds)
        )
    return compared


def seed_of(part: str, seed: int) -> list[int]:
    """The seed of a part's resamples: parts are drawn independently of one another."""
    return [seed, zlib.crc32(part.encode())]
