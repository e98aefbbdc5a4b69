"""Chooses the held-out part of a set: seeded, and never the same question on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence


def held_out(keys: Sequence[bytes], share: float, seed: int) -> set[int]:
    """The row numbers to hold out: about `share` of `keys`, at least one, never all.

    Rows with equal keys (the same question in the same context) stay together. Empty when
    there are fewer than two different keys.
    """
    groups: dict[bytes, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    order = list(groups.values())
    random.Random(seed).shuffle(order)  # noqa: S311 - a split, not a secret
    wanted = max(1, round(share * len(keys)))
    chosen: set[int] = set()
    for group in order[:-1]:
        if len(chosen) >= wanted:
            break
        chosen.update(group)
    return chosen
