"""The tokens of a batch without its padding: which are computed, and which attend to each other.

Reads padded batches as collators make them (padding on the right); writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .audit import IGNORED

# Conversations share a block of attention while the shortest has this share of the longest's
# tokens: a block of its own costs about as much as a tenth of a batch's attention.
_ALIKE = 0.75


@dataclass(frozen=True)
class Block:
    """Conversations of like length, one behind the other from token `start` to `end`.

    `spread` gives for each of their padded places (conversations × width) the token that stands
    there, counted from `start`, and `gathered` the padded place of each token; both None where
    all are of one length.
    """

    start: int
    end: int
    width: int
    spread: Tensor | None
    gathered: Tensor | None


@dataclass(frozen=True)
class Layout:
    """T tokens behind each other, conversation by conversation, the longest first.

    `taken` gives the place of each in the flattened batch, `positions` where it stands in its
    conversation, `wanted` the token that it should guess (IGNORED: none).
    """

    taken: Tensor
    positions: Tensor
    wanted: Tensor
    blocks: tuple[Block, ...]


def layout(labels: Tensor, positions: Tensor | None = None) -> Layout:
    """The layout of a batch with these labels (rows × width).

    A conversation begins with each row or, where `positions` (rows × width) are given, wherever
    they are 0. Behind its last learnt token nothing is computed: causal attention shows it nobody.
    """
    wanted = torch.full_like(labels, IGNORED)
    wanted[:, :-1] = labels[:, 1:]
    wanted = wanted.flatten()
    width = labels.shape[1]
    if positions is None:
        borders = list(range(0, labels.numel() + 1, width))
    else:
        begins = positions == 0
        begins[:, 0] = True
        borders = [*begins.flatten().nonzero().squeeze(-1).tolist(), labels.numel()]
    learnt = (wanted != IGNORED).nonzero().squeeze(-1)
    before = torch.searchsorted(learnt, torch.tensor(borders)).tolist()  # learnt ones, by border
    places = [
        (start, int(learnt[after - 1]) + 1 - start)
        for start, (earlier, after) in zip(borders, pairwise(before), strict=False)
        if after > earlier
    ]
    return _arranged(places or [(0, 1)], wanted)


def _arranged(places: Sequence[tuple[int, int]], wanted: Tensor) -> Layout:
    """The layout of conversations with these first places and lengths."""
    ordered = sorted(places, key=lambda place: -place[1])
    taken = torch.cat([torch.arange(start, start + size) for start, size in ordered])
    positions = torch.cat([torch.arange(size) for _, size in ordered])
    blocks, start = [], 0
    for group in _alike([size for _, size in ordered]):
        blocks.append(_block(start, group))
        start += sum(group)
    return Layout(taken, positions, wanted[taken], tuple(blocks))


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Falling lengths in groups of like ones."""
    group: list[int] = []
    for length in lengths:
        if group and length < _ALIKE * group[0]:
            yield group
            group = []
        group.append(length)
    if group:
        yield group


def _block(start: int, lengths: Sequence[int]) -> Block:
    width, total = lengths[0], sum(lengths)
    if lengths[-1] == width:
        return Block(start, start + total, width, None, None)
    # Padding repeats a conversation's last token: causal attention never looks at it.
    borders = pairwise([0, *accumulate(lengths)])
    spread = [torch.arange(a, a + width).clamp(max=b - 1) for a, b in borders]
    gathered = [torch.arange(n) + i * width for i, n in enumerate(lengths)]
    return Block(start, start + total, width, torch.cat(spread), torch.cat(gathered))
