"""Chooses the held-out part of a set: seeded, and never the same question on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .arrays import U64, Bools, Ints, mixed

ENOUGH = 10  # held-out questions that a gate can judge by


def held_out(keys: U64, share: float, seed: int) -> Bools:
    """Which rows to hold out: about `share` of `keys`, at least one, never all.

    Rows with equal keys (the same question in the same context) stay together. None when there
    are fewer than two different keys. The order of the rows does not matter.
    """
    groups, members, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    order = _order(groups, seed)
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(groups), np.bool_)
    wanted = max(1, round(share * len(keys)))
    chosen[order[:-1]] = before[:-1] < wanted
    return chosen[members]


def held_out_reworded(
    keys: U64, share: float, seed: int, teachers: Sequence[Sequence[int]]
) -> Bools:
    """The same, of rows whose fact is still trained on; `teachers[row]` are rows that teach it.

    Such a question can be answered by a model that has learnt its chats. Where there are fewer
    than ENOUGH of them, others are added as `held_out` chooses them, up to the share.
    """
    groups, members, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    wanted = max(1, round(share * len(keys)))
    rows_of = [np.flatnonzero(members == group) for group in range(len(groups))]
    taught_by = [{row for row in rows if members[row] != members[i]} for i, rows in
                 enumerate(teachers)]  # fmt: skip
    teaches: list[list[int]] = [[] for _ in keys]
    for row, rows in enumerate(taught_by):
        for teacher in rows:
            teaches[teacher].append(row)
    left = [len(rows) for rows in taught_by]  # teachers of each row that are still trained on
    chosen = np.zeros(len(groups), np.bool_)
    held: set[int] = set()
    order = _order(groups, seed)
    for group in order.tolist():
        rows = rows_of[group].tolist()
        lost = Counter(row for teacher in rows for row in teaches[teacher])
        if len(held) >= wanted or any(left[row] < 1 for row in rows):
            continue
        if any(row in held and left[row] - count < 1 for row, count in lost.items()):
            continue
        chosen[group] = True
        held.update(rows)
        for row, count in lost.items():
            left[row] -= count
    if len(held) < min(wanted, ENOUGH):
        count = len(held)
        for group in order.tolist():
            if count >= wanted or chosen.sum() >= len(groups) - 1:
                break
            if not chosen[group]:
                chosen[group] = True
                count += int(sizes[group])
    return chosen[members]


def _order(groups: U64, seed: int) -> Ints:
    start = mixed(np.array([seed % 2**64], np.uint64))
    return np.argsort(mixed(groups ^ start), kind="stable")
