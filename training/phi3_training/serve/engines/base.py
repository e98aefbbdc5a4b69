"""What every engine offers to the server: one call that streams an answer, and its errors.

Reads and writes nothing. The errors' texts reach the caller of the endpoint.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Message = Mapping[str, str]
FinishReason = Literal["stop", "length"]


class EngineError(Exception):
    """The engine could not answer; `status` is what its HTTP server would return.

    `echoes`: the text may repeat the caller's own words, so it belongs in a body only.
    """

    status = 500
    echoes = False


class InvalidPromptError(EngineError):
    """The conversation cannot be put to this model (role order, a role it does not know)."""

    status = 400


class PromptTooLongError(InvalidPromptError):
    """The prompt alone fills the model's context."""

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens; this model's context holds {context_length} "
            "tokens, prompt and answer together. Send fewer or shorter messages."
        )


class UpstreamRefusalError(InvalidPromptError):
    """The upstream server rejected the request, in its own words."""

    echoes = True


class UpstreamError(EngineError):
    """The upstream server failed or cannot be reached."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen; None leaves it to the model's own defaults.

    Temperature 0 takes the likeliest token each time.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer; the last one carries the finish reason. Counts are totals so far."""

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(Protocol):
    """Something that answers conversations. Closing a stream frees what it holds."""

    @property
    def name(self) -> str: ...

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; 0 when the engine does not know."""
        ...

    @property
    def active(self) -> int:
        """Answers being written or waiting for their turn."""
        ...

    def stream(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]: ...

    async def close(self) -> None: ...


# Ends an answer at a stop string, also where the string spans several tokens.
# Reads and writes nothing.


class StopCutter:
    """Lets text through up to the first stop string; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to send; sets `hit` at a stop string."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        self._held += text
        places = [at for at in map(self._held.find, self._stops) if at >= 0]
        if places:
            self.hit = True
            return self._release(min(places))
        return self._release(len(self._held) - self._unsure())

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.hit else self._release(len(self._held))

    def _release(self, length: int) -> str:
        safe, self._held = self._held[:length], self._held[length:]
        return safe

    def _unsure(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if self._held.endswith(tuple(s[:size] for s in self._stops if len(s) > size)):
                return size
        return 0
