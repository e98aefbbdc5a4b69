"""What loaded weights answer greedily, and how probable they find the expected answers, at once.

One pass reads a question together with its expected answer: it gives the loss and, as long as the
model's own choice is the expected token, the answer itself. Only the rest is written token by
token, many rows at a time. Exact: each token is the likeliest one after those before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from ..finetune.rows import Conversation
from ..prompt import ChatFormat
from .perplexity import TOKENS_PER_PASS, answer_losses, marked_losses
from .rows import Answered, AnswerLoss, Said

# Rows that are done leave when they are this share of all: leaving copies the cache.
_LEAVE_AT = 0.25


@dataclass(frozen=True)
class Asked:
    """A question; `expected` is empty where no answer is expected and none is measured."""

    prompt: Conversation
    expected: str = ""

    @property
    def whole(self) -> Conversation:
        """The question with its expected answer."""
        return [*self.prompt, {"role": "assistant", "content": self.expected}]


@dataclass
class _Row:
    """A question as token ids; `ids` are the prompt and, where it is one pass, what is expected."""

    index: int
    prompt: int
    ids: list[int]
    mask: list[int]
    limit: int
    alone: bool
    said: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended or len(self.said) >= self.limit

    def hear(self, token: int, stops: frozenset[int]) -> None:
        """Take the next token of the answer."""
        self.said.append(token)
        self.ended = token in stops


def examine(
    model: Any,
    chat: ChatFormat,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int,
    at_once: int,
    share_limit: int | None = None,
    step: Callable[[int], None] = lambda _count: None,
) -> list[Answered]:
    """The answer of at most `max_new_tokens` tokens to each question, and its expected one's loss.

    `said` is None where a prompt alone fills the context, `loss` where question and expected answer
    do not fit into it. `share_limit`: rows that may grow longer run alone (see engines/rope.py).
    """
    losses: list[AnswerLoss | None] = [None] * len(asked)
    rows = []
    for index, one in enumerate(asked):
        row = _row(chat, index, one, max_new_tokens, share_limit)
        if row is None:
            step(1)
        else:
            rows.append(row)
    _losses_apart(model, chat, asked, rows, losses)
    writer = _Writer(model, chat, losses)
    # Like lengths together: less padding, and a batch of questions of one form ends together.
    waiting = deque(sorted(rows, key=lambda row: (row.alone, len(row.ids))))
    while waiting or writer.rows:
        while waiting and (batch := _next_batch(waiting, len(writer.rows), at_once)):
            writer.read(batch)
        step(writer.write())
    return [
        Answered(_said(chat, row), loss)
        for row, loss in zip(_by_index(rows, len(asked)), losses, strict=True)
    ]


def _row(
    chat: ChatFormat, index: int, asked: Asked, limit: int, share_limit: int | None
) -> _Row | None:
    """A question that is to be answered; None where its prompt alone fills the context."""
    prompt = chat.encode_prompt(asked.prompt)
    room = chat.context_length - len(prompt)
    if room < 1:
        return None
    row = _Row(index, len(prompt), prompt, [0] * len(prompt), min(limit, room), alone=False)
    example = chat.encode_example(asked.whole) if asked.expected else None
    longest = max(len(prompt) + row.limit, len(example.input_ids) if example else 0)
    row.alone = share_limit is not None and longest > share_limit
    if example is None or row.alone or len(example.input_ids) > chat.context_length:
        return row
    # An answer whose first token the tokenizer joins to its prompt cannot be read in the same pass.
    if list(example.input_ids[: len(prompt)]) == list(prompt):
        row.ids, row.mask = list(example.input_ids), list(example.assistant_mask)
    return row


def _losses_apart(
    model: Any,
    chat: ChatFormat,
    asked: Sequence[Asked],
    rows: Sequence[_Row],
    losses: list[AnswerLoss | None],
) -> None:
    """Losses of the questions that are not read together with their expected answer."""
    together = {row.index for row in rows if len(row.ids) > row.prompt}
    apart = [i for i, one in enumerate(asked) if one.expected and i not in together]
    found = answer_losses(model, chat, [asked[i].whole for i in apart])
    for index, loss in zip(apart, found, strict=True):
        losses[index] = loss


def _next_batch(waiting: deque[_Row], running: int, at_once: int) -> list[_Row]:
    """The rows to read now: none while most places are taken, or while one row runs alone."""
    if running > at_once // 2 or (running and waiting[0].alone):
        return []
    batch: list[_Row] = []
    while waiting and running + len(batch) < at_once:
        row = waiting[0]
        # Sorted: this row is the longest so far, and the others are padded to it.
        wide = (len(batch) + 1) * len(row.ids) > TOKENS_PER_PASS
        if batch and (wide or row.alone):
            break
        batch.append(waiting.popleft())
        if row.alone:
            break
    return batch


class _Writer:
    """The rows being answered: their keys and values, padded on the left, and their next tokens."""

    def __init__(self, model: Any, chat: ChatFormat, losses: list[AnswerLoss | None]) -> None:
        self.rows: list[_Row] = []
        self._model = model
        self._device = model.device
        self._stops = frozenset(chat.stop_token_ids)
        self._pad = chat.pad_token_id
        self._losses = losses
        self._done_at_once = 0
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def read(self, rows: Sequence[_Row]) -> None:
        """Read new rows, prompts and expected answers together; they join those being answered."""
        width = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), width), self._pad)
        seen = torch.zeros((len(rows), width), dtype=torch.long)
        marked = torch.zeros((len(rows), width), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            seen[number, : len(row.ids)] = 1
            marked[number, : len(row.ids)] = torch.tensor(row.mask, dtype=torch.bool)
        ids, seen, marked = (one.to(self._device) for one in (ids, seen, marked))
        # Logits are the widest thing here: only from the first position that is looked at.
        first = min(min(row.prompt, (*row.mask, 1).index(1)) for row in rows) - 1
        cache = DynamicCache()
        logits = self._model(
            input_ids=ids,
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=width - first,
        ).logits
        losses = marked_losses(logits[:, :-1], ids[:, first + 1 :], marked[:, first + 1 :])
        chosen = logits.argmax(dim=-1).tolist()
        for row, loss, tokens in zip(rows, losses, chosen, strict=True):
            if any(row.mask):
                self._losses[row.index] = loss
            self._follow(row, tokens[row.prompt - 1 - first :])
        self._join(rows, cache)

    def _follow(self, row: _Row, chosen: Sequence[int]) -> None:
        """Take the model's choices as long as what was read before them is its own answer."""
        expected = row.ids[row.prompt :]
        for place, token in enumerate(chosen[: len(expected) + 1]):
            row.hear(token, self._stops)
            if row.done or place == len(expected) or token != expected[place]:
                return

    def _join(self, rows: Sequence[_Row], cache: Any) -> None:
        """Add the rows that are not done, moved to the right end of what is kept of them."""
        open_rows = [number for number, row in enumerate(rows) if not row.done]
        self._done_at_once += len(rows) - len(open_rows)
        if not open_rows:
            return
        # The last token heard has not been read yet.
        sizes = [rows[n].prompt + len(rows[n].said) - 1 for n in open_rows]
        width = max(*sizes, self._mask.shape[1])
        columns = torch.arange(width, device=self._device)
        starts = width - torch.tensor(sizes, device=self._device)[:, None]
        mask = (columns >= starts).long()
        places = (columns - starts).clamp(min=0)
        chosen = torch.tensor(open_rows, device=self._device)
        old_mask = _pad_left(self._mask, 1, width)
        for number, layer in enumerate(cache.layers):
            for name in ("keys", "values"):
                states = getattr(layer, name)[chosen]
                index = places[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                states = states.gather(2, index)
                if self.rows:
                    mine = getattr(self._cache.layers[number], name)
                    states = torch.cat([_pad_left(mine, 2, width), states])
                setattr(layer, name, states)
        self._cache = cache
        self._mask = torch.cat([old_mask, mask]) if self.rows else mask
        self.rows += [rows[number] for number in open_rows]

    @torch.inference_mode()
    def write(self) -> int:
        """One more token of every row; how many answers are done since the last call."""
        done, self._done_at_once = self._done_at_once, 0
        if not self.rows:
            return done
        # A row that is done waits for others to leave with it, and writes what nobody reads.
        tokens = torch.tensor([[row.said[-1]] for row in self.rows], device=self._device)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], dim=1)
        logits = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=self._mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        for row, token in zip(self.rows, logits[:, -1].argmax(dim=-1).tolist(), strict=True):
            if not row.done:
                row.hear(token, self._stops)
                done += row.done
        self._leave()
        return done

    def _leave(self) -> None:
        kept = [number for number, row in enumerate(self.rows) if not row.done]
        if len(self.rows) - len(kept) < _LEAVE_AT * len(self.rows):
            return
        self.rows = [self.rows[number] for number in kept]
        if not kept:
            self._cache = None
            self._mask = self._mask[:0, :0]
            return
        self._mask = self._mask[kept]
        first = int(self._mask.argmax(dim=1).min())
        self._mask = self._mask[:, first:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[kept][:, :, first:]
            layer.values = layer.values[kept][:, :, first:]


def _pad_left(tensor: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def _by_index(rows: Sequence[_Row], count: int) -> list[_Row | None]:
    found: list[_Row | None] = [None] * count
    for row in rows:
        found[row.index] = row
    return found


def _said(chat: ChatFormat, row: _Row | None) -> Said | None:
    if row is None:
        return None
    text = chat.decode(row.said[:-1] if row.ended else row.said)
    return Said(text, cut=not row.ended)
