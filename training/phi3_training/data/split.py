"""Chooses the held-out part of a set: seeded, and never the same question on both sides."""

from __future__ import annotations

import numpy as np

from .arrays import U64, Bools, mixed


def held_out(keys: U64, share: float, seed: int) -> Bools:
    """Which rows to hold out: about `share` of `keys`, at least one, never all.

    Rows with equal keys (the same question in the same context) stay together. None when there
    are fewer than two different keys. The order of the rows does not matter.
    """
    groups, members, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    start = mixed(np.array([seed % 2**64], np.uint64))
    order = np.argsort(mixed(groups ^ start), kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(groups), np.bool_)
    wanted = max(1, round(share * len(keys)))
    chosen[order[:-1]] = before[:-1] < wanted
    return chosen[members]
