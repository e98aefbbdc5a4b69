"""The few names of Prompt flow that a flow's Python nodes import, without Prompt flow.

So the nodes of a converted flow run as they are. Only where Prompt flow itself is not installed;
nothing is changed there.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class CustomConnection:
    """Configs and secrets, which can be read as attributes too. Shows no secret."""

    def __init__(
        self,
        secrets: Mapping[str, str] | None = None,
        configs: Mapping[str, str] | None = None,
        name: str = "",
        **_others: Any,
    ) -> None:
        self.secrets = dict(secrets or {})
        self.configs = dict(configs or {})
        self.name = name

    def __getattr__(self, item: str) -> str:
        # Through __dict__: an attribute that is looked up here may not be set yet, when it is
        # copied.
        for values in (self.__dict__.get("secrets", {}), self.__dict__.get("configs", {})):
            if item in values:
                return str(values[item])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {item!r}")

    def __repr__(self) -> str:
        return f"CustomConnection({self.name!r})"


class CustomStrongTypeConnection(CustomConnection):
    """A connection with a type of its own."""


class Secret(str):
    """The annotation of a secret."""

    __slots__ = ()


class PromptflowException(Exception):  # noqa: N818 - Prompt flow's name
    """What nodes may catch."""


class ConnectionProvider:
    """There is no store of connections here."""

    @staticmethod
    def get_instance() -> ConnectionProvider:
        """One that knows no connection."""
        return ConnectionProvider()

    def get(self, name: str) -> CustomConnection:
        """Always raises PromptflowException."""
        raise PromptflowException(f"there is no connection {name!r}")


def tool(function: Any = None, *, streaming_option_parameter: str = "", **_others: Any) -> Any:
    """Marks a node's function; called or not, as Prompt flow's."""

    def mark(marked: _F) -> _F:
        # Read by converted.load: which parameter asks for a stream.
        marked.__phi3_tool__ = streaming_option_parameter  # type: ignore[attr-defined]
        return marked

    return mark if function is None else mark(function)


def trace(function: Any = None, **_others: Any) -> Any:
    """Traces nothing."""
    return (lambda marked: marked) if function is None else function


_CONNECTIONS = {
    "CustomConnection": CustomConnection,
    "CustomStrongTypeConnection": CustomStrongTypeConnection,
    "ConnectionProvider": ConnectionProvider,
}
NAMES: dict[str, dict[str, Any]] = {
    "promptflow": {"tool": tool},
    "promptflow.core": {"tool": tool, **_CONNECTIONS},
    "promptflow.connections": _CONNECTIONS,
    "promptflow.entities": {"CustomConnection": CustomConnection},
    "promptflow.contracts": {},
    "promptflow.contracts.types": {"Secret": Secret},
    "promptflow.exceptions": {
        "PromptflowException": PromptflowException,
        "UserErrorException": PromptflowException,
    },
    "promptflow.tracing": {"trace": trace},
}


def provide_names() -> None:
    """Make `import promptflow…` find these, unless Prompt flow is installed."""
    if "promptflow" in sys.modules or importlib.util.find_spec("promptflow") is not None:
        return
    for name, values in NAMES.items():
        module = ModuleType(name, "Names for converted flows; see phi3_agent.promptflow_names.")
        # __path__ makes it a package, so that `import promptflow.core` goes on to the next name.
        module.__dict__.update(values, __path__=[])
        sys.modules[name] = module
