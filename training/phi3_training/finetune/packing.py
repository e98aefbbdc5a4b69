"""Packs short conversations into rows of one length; none sees another, masks stay as they are.

Reads encoded conversations; the model is given positions that begin anew at each of them, from
which its sdpa and eager attention build a block-diagonal mask.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..prompt import Example
from .audit import IGNORED, expected_labels
from .audit_packed import SeenPacked


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which rows go together: the longest first, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), sorted
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[row], -1))
        if at == len(room):
            left, number = size, len(bins)
            bins.append([])
        else:
            left, number = room.pop(at)
        bins[number].append(row)
        insort(room, (left - lengths[row], number))
    return bins


def packed_rows(examples: Sequence[Example], size: int) -> Dataset:
    """The conversations in rows of at most `size` tokens; `seq_lengths` says where each ends."""
    bins = pack([len(example.input_ids) for example in examples], size)
    return Dataset.from_dict(
        {
            "input_ids": [[t for i in bin_ for t in examples[i].input_ids] for bin_ in bins],
            "labels": [[t for i in bin_ for t in expected_labels(examples[i])] for bin_ in bins],
            "seq_lengths": [[len(examples[i].input_ids) for i in bin_] for bin_ in bins],
        }
    )


class PackedCollator:
    """Batches of packed rows: padded on the right, positions instead of an attention mask.

    An attention mask would make the model overlook the positions.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self._pad)
        labels = torch.full((len(rows), width), IGNORED)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[number, :size] = torch.tensor(row["input_ids"])
            labels[number, :size] = torch.tensor(row["labels"])
            # The padding is one more conversation, which nobody sees.
            lengths = [*row["seq_lengths"], width - size]
            positions[number] = torch.cat([torch.arange(length) for length in lengths])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def as_packed(row: Mapping[str, Any], batch: Mapping[str, Tensor], number: int) -> SeenPacked:
    """Row `number` of a batch, its padding left out."""
    size = sum(row["seq_lengths"])
    ids, labels = batch["input_ids"][number, :size], batch["labels"][number, :size]
    return SeenPacked(ids.tolist(), labels.tolist(), batch["position_ids"][number, :size].tolist())
