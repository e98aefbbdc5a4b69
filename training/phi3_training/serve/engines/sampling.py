"""Picks the next token from a row of logits: greedy, temperature, top-k, top-p, penalties.

One `Sampler` per answer with its own random stream, so that neighbours in a batch do not matter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Sampling

Logits = NDArray[np.float32]

# e**-30 of the likeliest token: dropping what is rarer keeps the sort below short.
_NEGLIGIBLE = 30.0


def defaults_of(model_dir: Path) -> Sampling:
    """The model's own defaults: generation_config.json as `generate` would follow it."""
    try:
        config = json.loads((model_dir / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if not config.get("do_sample"):
        return Sampling(temperature=0.0, top_p=1.0, top_k=0)
    return Sampling(
        temperature=float(config.get("temperature") or 1.0),
        top_p=float(config.get("top_p") or 1.0),
        top_k=int(config.get("top_k") or 0),
    )


def with_defaults(sampling: Sampling, defaults: Sampling) -> Sampling:
    """`sampling` with what it leaves open filled in."""
    names = ("temperature", "top_p", "top_k")
    open_ones = {n: getattr(defaults, n) for n in names if getattr(sampling, n) is None}
    return replace(sampling, **open_ones)


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature or 0.0
        self._top_p = 1.0 if sampling.top_p is None else sampling.top_p
        self._top_k = sampling.top_k or 0
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        self._random = np.random.default_rng(sampling.seed)
        self._counts: NDArray[np.int32] | None = None

    def pick(self, logits: Logits) -> int:
        """The next token for a row of logits."""
        if self._presence or self._frequency:
            logits = self._penalise(logits)
        token = self._draw(logits) if self._temperature > 0 else int(logits.argmax())
        if self._counts is not None:
            self._counts[token] += 1
        return token

    def _penalise(self, logits: Logits) -> Logits:
        if self._counts is None:
            self._counts = np.zeros(logits.shape[-1], np.int32)
        seen = (self._counts > 0) * self._presence
        often = self._counts * self._frequency
        penalised: Logits = (logits - seen - often).astype(np.float32)
        return penalised

    def _draw(self, logits: Logits) -> int:
        scores = logits.astype(np.float64) / self._temperature
        candidates: NDArray[Any] = np.flatnonzero(scores > scores.max() - _NEGLIGIBLE)
        order = candidates[np.argsort(-scores[candidates], kind="stable")]
        if self._top_k > 0:
            order = order[: self._top_k]
        weights = np.exp(scores[order] - scores[order[0]])
        cumulative = np.cumsum(weights / weights.sum())
        if self._top_p < 1:
            # The smallest set that reaches top_p; the likeliest token is always in it.
            kept = int(np.searchsorted(cumulative, self._top_p)) + 1
            order, cumulative = order[:kept], cumulative[:kept] / cumulative[:kept][-1]
        drawn = int(np.searchsorted(cumulative, self._random.random(), side="right"))
        return int(order[min(drawn, len(order) - 1)])
