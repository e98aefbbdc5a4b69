"""Several models at one endpoint, selected by name: the default one and others.

Reads and writes nothing; the models are engines that are already loaded.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence

from .base import Chunk, Engine, EngineError, Message, Sampling


class UnknownModelError(EngineError):
    """A request names a model that is not served here."""

    status = 404


class NamedEngines:
    """Engines by name; as an engine itself it is the default one. See `base.Engine`."""

    def __init__(
        self, default: Engine, default_names: Sequence[str], others: Mapping[str, Engine]
    ) -> None:
        self._default = default
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
