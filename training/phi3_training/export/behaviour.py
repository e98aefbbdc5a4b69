"""Holds how two models go on with the same prompts against each other, token by token.

Pure: works on step models and ids; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..serve.engines.batch import StepModel

Logits = NDArray[np.float32]
Step = Callable[[], None]


@dataclass(frozen=True)
class Prompt:
    """A prompt: how a report names it, and its ids."""

    name: str
    ids: list[int]


@dataclass(frozen=True)
class Trace:
    """A greedy answer and, for each of its tokens, the logits that it was chosen from."""

    tokens: list[int]
    logits: Logits


@dataclass(frozen=True)
class Deviation:
    """One prompt: mean KL over its answer, tokens chosen alike, the first one that is not."""

    prompt: str
    kl: float
    tokens: int
    alike: int
    first_other: tuple[int, int, int] | None  # place in the answer, its token, the other's token


def greedy(model: StepModel, prompt: Sequence[int], stops: Sequence[int], most: int) -> Trace:
    """The likeliest answer, its end included."""
    # Copies: an engine may write the next logits into the same memory.
    rows = [model.add(prompt, len(prompt) + most).copy()]
    tokens = [int(rows[0].argmax())]
    while len(tokens) < most and tokens[-1] not in stops:
        rows.append(model.step([tokens[-1]])[0].copy())
        tokens.append(int(rows[-1].argmax()))
    model.drop(0)
    model.reset()
    return Trace(tokens, np.stack(rows))


def forced(model: StepModel, prompt: Sequence[int], tokens: Sequence[int]) -> Logits:
    """The logits of a model that is made to say `tokens`."""
    rows = [model.add(prompt, len(prompt) + len(tokens)).copy()]
    rows += [model.step([token])[0].copy() for token in tokens[:-1]]
    model.drop(0)
    model.reset()
    return np.stack(rows)


def deviation(prompt: Prompt, trace: Trace, logits: Logits) -> Deviation:
    """How far `logits` are from the trace; KL in nats, of the trace's distribution to the other."""
    size = min(trace.logits.shape[1], logits.shape[1])
    first, second = _log_softmax(trace.logits[:, :size]), _log_softmax(logits[:, :size])
    kl = (np.exp(first) * (first - second)).sum(axis=1)
    chosen = logits.argmax(axis=1)
    other = np.flatnonzero(chosen != np.array(trace.tokens))
    where = int(other[0]) if other.size else None
    return Deviation(
        prompt.name,
        max(0.0, float(kl.mean())) if np.isfinite(kl).all() else float("inf"),
        len(trace.tokens),
        len(trace.tokens) - len(other),
        None if where is None else (where, trace.tokens[where], int(chosen[where])),
    )


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result
