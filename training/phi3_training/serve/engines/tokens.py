"""The half that all token engines share: conversation to ids, ids to text, stops, limits.

Reads the model folder's chat format through `ChatFormat`; the other half is a `StepModel`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from ...errors import StageError
from ...prompt import ChatFormat, read_json
from .base import (
    Chunk,
    FinishReason,
    InvalidPromptError,
    Message,
    PromptTooLongError,
    Sampling,
    StopCutter,
)
from .batch import Batcher, Job, Sampler, StepModel, defaults_of, with_defaults

logger = logging.getLogger(__name__)

# Longer prompts are tokenised in a thread, so that other streams do not stall.
_LONG_PROMPT = 20_000  # characters
# JSON can spell these; they are no text, and the tokenizer cannot take them.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
# Kinds whose rotation of a token depends on its own position only.
_PLAIN = frozenset({None, "default", "linear", "yarn", "llama3"})


def share_limit(model_dir: Path) -> int | None:
    """Up to which length a model's rows may share a batch; None where length does not matter."""
    # LongRoPE models (Phi-3 128k, Phi-4-mini) rotate all rows of a batch by one of two tables,
    # chosen by the longest row: a row beyond the switch would change its neighbours' answers.
    config = read_json(model_dir / "config.json")
    ropes = [config.get(name) for name in ("rope_parameters", "rope_scaling")]
    given: list[dict[str, Any]] = [rope for rope in ropes if isinstance(rope, dict)]
    if {rope.get("rope_type", rope.get("type")) for rope in given} <= _PLAIN:
        return None
    lengths = [source.get("original_max_position_embeddings") for source in (*given, config)]
    lengths.append(config.get("max_position_embeddings"))
    return next((length for length in lengths if isinstance(length, int)), 0)


def chat_format(folder: Path) -> ChatFormat:
    """The chat format of a model folder; raises StageError where it has none."""
    try:
        return ChatFormat.from_folder(folder)
    except ValueError as error:
        raise StageError(str(error)) from None


class TokenEngine:
    """An engine built from a chat format and a step model; see `base.Engine`."""

    def __init__(
        self,
        name: str,
        chat: ChatFormat,
        model: StepModel,
        *,
        slots: int,
        defaults: Sampling,
        share_limit: int | None = None,
    ) -> None:
        self.name = name
        self.context_length = chat.context_length
        self._chat = chat
        self._defaults = defaults
        self._batcher = Batcher(model, slots=slots, share_limit=share_limit)

    @classmethod
    def of_folder(cls, name: str, folder: Path, model: StepModel, *, slots: int) -> TokenEngine:
        """The engine for a folder's chat format and defaults, and a model made from its weights."""
        return cls(
            name,
            chat_format(folder),
            model,
            slots=slots,
            defaults=defaults_of(folder),
            share_limit=share_limit(folder),
        )

    @property
    def active(self) -> int:
        """Answers being written or waiting for their turn."""
        return self._batcher.active

    async def stream(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]:
        """The answer in chunks. Raises InvalidPromptError before the first one."""
        texts = "".join(str(message.get("content")) for message in messages)
        if _HALF_CHARACTER.search(texts):
            raise InvalidPromptError("A message holds half a character (a lone surrogate).")
        encode = self._chat.encode_prompt
        try:
            if len(texts) > _LONG_PROMPT:
                ids = await asyncio.to_thread(encode, messages, any_order=True)
            else:
                ids = encode(messages, any_order=True)
        except ValueError as error:
            raise InvalidPromptError(str(error)) from None
        room = self.context_length - len(ids)
        if room < 1:
            raise PromptTooLongError(len(ids), self.context_length)
        own = () if sampling.ignore_eos else self._chat.stop_token_ids
        stop_ids = frozenset((*own, *sampling.stop_token_ids))
        sampler = Sampler(with_defaults(sampling, self._defaults))
        job = Job(ids, min(sampling.max_new_tokens, room), sampler, stop_ids)
        self._batcher.submit(job)
        writer = _Writer(self._chat, job.stop_ids, sampling.stop)
        text = ""
        try:
            while writer.reason is None and (token := await job.next()) is not None:
                text = writer.push(token)
                if text and writer.reason is None:
                    yield Chunk(text, None, len(job.ids), writer.count)
                    text = ""
            rest = text + writer.finish()
            yield Chunk(rest, writer.reason or "length", len(job.ids), writer.count)
        finally:  # also where the caller closes the stream: the row is free before the next step
            self._batcher.cancel(job)

    async def close(self) -> None:
        """Stop the owner thread; unfinished answers fail."""
        await asyncio.to_thread(self._batcher.close)


class _Writer:
    """Text of one answer: decodes ids, ends at a stop token or a stop string."""

    def __init__(
        self, chat: ChatFormat, stop_ids: frozenset[int], stop_texts: Sequence[str]
    ) -> None:
        self.count = 0
        self.reason: FinishReason | None = None
        self._stop_ids = stop_ids
        self._decoder = chat.stream_decoder()
        self._cutter = StopCutter(stop_texts)

    def push(self, token: int) -> str:
        """The text that may be sent now that `token` has come."""
        self.count += 1
        if token in self._stop_ids:
            self.reason = "stop"
            return ""
        return self._cut(self._decoder.push(token))

    def finish(self) -> str:
        """What is left at the end of the answer."""
        if self._cutter.hit:
            return ""
        text = self._cut(self._decoder.flush())
        return text + self._cutter.flush()

    def _cut(self, text: str) -> str:
        safe = self._cutter.push(text)
        if self._cutter.hit:
            self.reason = "stop"
        return safe
