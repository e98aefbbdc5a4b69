"""What every engine offers to the server: one call that streams an answer, and its errors.

Several models at one endpoint are an engine as well, which chooses by name. Reads and writes
nothing. The errors' texts reach the caller of the endpoint.
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
        # 502 where the other server failed, 503 where it is only busy.
        self.status = status


class UnknownModelError(EngineError):
    """A request names a model that is not served here."""

    # As for a deployment that does not exist.
    status = 404


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen; None leaves it to the model's own defaults.

    Temperature 0 takes the likeliest token each time.
    """

    # Azure's images default to the same.
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


class NamedEngines:
    """Engines by name; as an engine itself it is the default one. See `Engine`."""

    def __init__(
        self, default: Engine, default_names: Sequence[str], others: Mapping[str, Engine]
    ) -> None:
        self._default = default
        # Several, because a client may name the model, or the deployment that serves it.
        self._default_names = frozenset(default_names)
        self._others = dict(others)

    @property
    def name(self) -> str:
        """The default engine's."""
        return self._default.name

    @property
    def context_length(self) -> int:
        """The base model's: all have the same."""
        return self._default.context_length

    @property
    def active(self) -> int:
        """Answers being written or waiting, of all models."""
        return sum(engine.active for engine in (self._default, *self._others.values()))

    def of(self, name: str | None) -> Engine:
        """The engine of that name. Raises UnknownModelError, which lists the names."""
        # A request without a name means the default, as OpenAI-compatible servers have it.
        if name is None or name in self._default_names:
            return self._default
        if name not in self._others:
            known = ", ".join(sorted([*self._default_names, *self._others]))
            raise UnknownModelError(f"There is no model {name!r} here; models: {known}")
        return self._others[name]

    def stream(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]:
        """An answer of the default model."""
        return self._default.stream(messages, sampling)

    async def close(self) -> None:
        """Close all engines."""
        for engine in (self._default, *self._others.values()):
            await engine.close()


def pick(engine: Engine, name: str | None) -> Engine:
    """The engine that a request asks for; where only one is served, its name does not matter."""
    return engine.of(name) if isinstance(engine, NamedEngines) else engine


class StopCutter:
    """Ends an answer at a stop string, also where the string spans several tokens.

    Lets text through up to the first stop string; holds back what may become one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to send; sets `hit` at a stop string."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        # Held, because the beginning of a stop string may be the end of a piece.
        self._held += text
        places = [at for at in map(self._held.find, self._stops) if at >= 0]
        if places:
            self.hit = True
            # The first one that occurs ends the answer, whichever was given first.
            return self._release(min(places))
        # The longest end of the text that a stop string begins with is not certain yet.
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for size in range(longest, 0, -1):
            if self._held.endswith(tuple(s[:size] for s in self._stops if len(s) > size)):
                return self._release(len(self._held) - size)
        return self._release(len(self._held))

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.hit else self._release(len(self._held))

    def _release(self, length: int) -> str:
        safe, self._held = self._held[:length], self._held[length:]
        return safe
