"""Figures of a comparison against their limits; what breaks one is named by prompt or layer.

Pure: works on what was measured; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .behaviour import Deviation
from .limits import Limits


class LayerFigures(Protocol):
    """What is needed of a compared weight."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> float: ...
    @property
    def change(self) -> float: ...
    @property
    def dtype(self) -> str: ...


def behaviour(
    found: Sequence[Deviation], limits: Limits, token: Callable[[int], str], sides: tuple[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Figures over all prompts and the problems; `sides` names the two models."""
    tokens = sum(d.tokens for d in found)
    agreement = sum(d.alike for d in found) / tokens
    mean_kl = sum(d.kl * d.tokens for d in found) / tokens
    worst = max(found, key=lambda d: d.kl)
    least = min(found, key=lambda d: d.alike / d.tokens)
    problems = []
    if agreement < limits.token_agreement:
        problems.append(
            f"only {agreement:.2%} of the tokens are chosen alike (at least "
            f"{limits.token_agreement:.1%}); worst prompt: {_told(least, token, sides)}"
        )
    if mean_kl > limits.mean_kl:
        problems.append(
            f"mean KL {mean_kl:.2g} (at most {limits.mean_kl:g}); "
            f"worst prompt: {_told(worst, token, sides)}"
        )
    if worst.kl > limits.worst_kl:
        problems.append(
            f"KL {worst.kl:.2g} at one prompt (at most {limits.worst_kl:g}): "
            f"{_told(worst, token, sides)}"
        )
    figures = {
        "prompts": len(found),
        "tokens": tokens,
        "token_agreement": round(agreement, 6),
        "answers_alike": sum(d.first_other is None for d in found),
        "mean_kl": mean_kl,
        "worst_kl": worst.kl,
        "worst_prompt": worst.prompt,
    }
    return figures, problems


def answers(
    before: Sequence[bool], after: Sequence[bool], names: Sequence[str], limits: Limits
) -> tuple[dict[str, Any], list[str]]:
    """Exact match on held-out rows before and after, and the rows that were lost."""
    rows = len(before)
    lost = [n for n, was, now in zip(names, before, after, strict=True) if was and not now]
    delta = (sum(after) - sum(before)) / rows
    figures = {
        "rows": rows,
        "exact_match_before": round(sum(before) / rows, 6),
        "exact_match": round(sum(after) / rows, 6),
        "delta": round(delta, 6),
        "lost": lost,
    }
    if -delta <= limits.lost_answers:
        return figures, []
    shown = ", ".join(repr(name[:60]) for name in lost[:3])
    return figures, [
        f"exact match on {rows} held-out rows falls by {-delta:.1%} "
        f"(at most {limits.lost_answers:.1%}); lost: {shown}"
    ]


def weights(
    found: Sequence[LayerFigures], limits: Limits, dtype: str
) -> tuple[dict[str, Any], list[str]]:
    """The layers that are furthest from base plus adapter."""
    by_weights = sorted(found, key=lambda layer: layer.weights, reverse=True)
    by_change = max(found, key=lambda layer: layer.change)
    problems = []
    wrong = [layer for layer in found if layer.dtype != dtype]
    if wrong:
        problems.append(
            f"{len(wrong)} weights are {wrong[0].dtype}, but the model was trained and is to be "
            f"merged in {dtype}; the first: {wrong[0].name}"
        )
    if by_weights[0].weights > limits.weights:
        problems.append(
            f"the layer {by_weights[0].name} is off by {by_weights[0].weights:.2g} of its size "
            f"(at most {limits.weights:g})"
        )
    if by_change.change > limits.change:
        problems.append(
            f"the layer {by_change.name} lost {by_change.change:.1%} of what the adapter changes "
            f"in it (at most {limits.change:.1%})"
        )
    top = [
        {"name": layer.name, "weights": layer.weights, "change": layer.change}
        for layer in by_weights[:5]
    ]
    figures = {"count": len(found), "largest": by_weights[0].weights, "layer": by_weights[0].name}
    return {**figures, "largest_change": by_change.change, "furthest": top}, problems


def _told(found: Deviation, token: Callable[[int], str], sides: tuple[str, str]) -> str:
    text = f"{found.prompt[:60]!r}"
    if found.first_other is None:
        return text
    place, first, second = found.first_other
    return (
        f"{text}, answer token {place + 1}: {sides[0]} says {token(first)!r}, "
        f"{sides[1]} says {token(second)!r}"
    )
