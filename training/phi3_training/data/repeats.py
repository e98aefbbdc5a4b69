"""Finds rows that are there twice, nearly twice, or on both sides of the split. Reads a Table."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .arrays import Bools, Ints
from .sketch import BANDS, Measure
from .table import Table

_CHAIN = 4  # earlier texts with the same number that one is measured against
_MEASURED = 256  # texts whose runs are kept at hand


class Pairs(NamedTuple):
    """Rows, each with an earlier row that it repeats."""

    rows: Ints
    others: Ints


class Repeats(NamedTuple):
    """What was found; a row stands in one list at most."""

    duplicates: Pairs
    leaks: Pairs
    near: Pairs


def find(table: Table) -> Repeats:
    """Compare all rows. Trained rows (with replayed ones) and held-out rows are a set each.

    A leak is a held-out row whose question is trained on. Near-duplicates are looked for among
    all rows that are neither.
    """
    held = table.in_part("validation")
    identity = table.identity ^ held.astype(np.uint64)
    first = first_of(identity)
    repeated = first != np.arange(len(table))
    asked = _trained_question(table, held)
    leaking = (asked >= 0) & ~repeated
    near = _near(table, ~repeated & ~leaking)
    return Repeats(
        Pairs(np.flatnonzero(repeated), first[repeated]),
        Pairs(np.flatnonzero(leaking), asked[leaking]),
        near,
    )


def first_of(keys: npt.NDArray[np.unsignedinteger]) -> Ints:
    """For each entry the number of the first one that equals it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.ones(len(keys), np.bool_)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = np.empty(len(keys), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _trained_question(table: Table, held: Bools) -> Ints:
    """For each held-out row a trained row with its question, or -1."""
    found = np.full(len(table), -1, np.int64)
    if not held.any():
        return found
    trained, asking = np.flatnonzero(~held), np.flatnonzero(held)
    order = np.argsort(table.question[trained], kind="stable")
    questions = table.question[trained][order]
    place = np.searchsorted(questions, table.question[asking])
    inside = place < len(questions)
    same = np.zeros(len(asking), np.bool_)
    same[inside] = questions[place[inside]] == table.question[asking][inside]
    found[asking[same]] = trained[order[place[same]]]
    return found


def _near(table: Table, wanted: Bools) -> Pairs:
    """Rows nearly like an earlier one that stays; each such pair was measured."""
    candidates = _candidates(table, wanted)
    measure = lru_cache(_MEASURED)(lambda row: Measure(table.body(row)))
    like: dict[int, int] = {}
    for row in sorted(candidates):
        earlier = {like.get(other, other) for other in candidates[row]}
        for other in sorted(earlier):
            if measure(row).near(measure(other)):
                like[row] = other
                break
    return Pairs(np.array(list(like), np.int64), np.array(list(like.values()), np.int64))


def _candidates(table: Table, wanted: Bools) -> dict[int, set[int]]:
    """Rows with earlier rows that they share a number of the sketch with."""
    found: dict[int, set[int]] = {}
    for band in range(BANDS):
        rows = np.flatnonzero(wanted & (table.bands[:, band] != 0))
        numbers = table.bands[rows, band]
        order = np.argsort(numbers, kind="stable")
        rows, numbers = rows[order], numbers[order]
        for back in range(1, _CHAIN + 1):
            same = np.flatnonzero(numbers[back:] == numbers[:-back])
            pairs = zip(rows[same + back].tolist(), rows[same].tolist(), strict=True)
            for row, other in pairs:
                found.setdefault(row, set()).add(other)
    return found
