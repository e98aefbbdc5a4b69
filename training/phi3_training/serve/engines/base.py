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
    """The engine could not answer; `status` is what its HTTP server would have said.

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
    """The server behind the `upstream` engine refused the request, in its own words."""

    echoes = True


class UpstreamError(EngineError):
    """The server behind the `upstream` engine failed or cannot be reached."""

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
