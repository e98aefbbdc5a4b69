"""The connection: is it there, is it whole, and does it lead over https or to this machine.

Reads the environment or Prompt flow's store; asks nothing over the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from phi3_tool.address import is_loopback
from phi3_tool.connection import ConnectionSettings, environment_names_endpoint
from phi3_tool.errors import ConfigurationError

from .. import promptflow_store
from ..errors import MissingExtraError, StageError
from .finding import Finding, Group

HERE = Group("connection")
_CONNECT = "phi3 connect, or see connections/README.md for one by hand"


class Connection:
    """What the checks of the connection found out for those that follow."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings: ConnectionSettings | None = None
        self.why_not = ""

    def checks(self) -> Iterator[Finding]:
        """Present, whole, over https; afterwards `settings` is there, or `why_not` says why not."""
        try:
            found, said = self._find()
        except (StageError, MissingExtraError) as error:
            self.why_not = "there is no connection to ask with"
            yield HERE.fault("present", str(error), _CONNECT)
            for check in ("shape", "https"):
                yield HERE.skipped(check, self.why_not)
            return
        yield HERE.ok("present", said)
        faults: list[str] = []
        try:
            self.settings = (
                ConnectionSettings.from_environment()
                if found is None
                else ConnectionSettings.from_connection(found)
            )
        except ConfigurationError as error:
            faults = list(error.faults) or [error.message]
            self.why_not = "the connection cannot be used as it stands"
        yield from self._shape_and_https(found, faults)

    def _find(self) -> tuple[object | None, str]:
        """The stored connection, or None where the environment outranks it."""
        if environment_names_endpoint():
            return None, "from PHI3_ENDPOINT and PHI3_KEY, which outrank the store"
        found = promptflow_store.stored_connection(self.name)
        return found, f"{self.name}, in {promptflow_store.database()}"

    def _shape_and_https(self, found: object | None, faults: list[str]) -> Iterator[Finding]:
        mend = _mend(self.name, in_environment=found is None)
        plain = [fault for fault in faults if "plain http" in fault]
        others = [fault for fault in faults if fault not in plain]
        if others:
            yield HERE.fault("shape", "; ".join(others), mend)
        else:
            yield HERE.ok("shape", self._shown())
        if plain:
            yield HERE.fault("https", plain[0], mend)
        elif self.settings is None:
            yield HERE.skipped("https", "the endpoint's address is not usable yet")
        else:
            yield HERE.ok("https", _way(self.settings.endpoint))

    def _shown(self) -> str:
        if self.settings is None:
            return "endpoint and key are filled in"
        options = {
            "deployment": self.settings.deployment,
            "dialect": self.settings.dialect,
            "context_length": self.settings.context_length,
        }
        said = [f"{name} {value}" for name, value in options.items() if value is not None]
        return ", ".join([self.settings.endpoint.partition("?")[0], "a key", *said])


def connection_of(dag: Mapping[str, object] | None) -> str | None:
    """The connection that a flow's nodes name; None where they name none."""
    nodes = (dag or {}).get("nodes")
    for node in nodes if isinstance(nodes, list) else []:
        inputs = node.get("inputs") if isinstance(node, dict) else None
        name = inputs.get("connection") if isinstance(inputs, dict) else None
        if isinstance(name, str) and name and not name.startswith("${"):
            return name
    return None


def _way(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme.lower() == "https":
        return f"the key goes over https to {parts.hostname}"
    here = is_loopback((parts.hostname or "").lower())
    return "plain http, to this machine only" if here else f"plain http to {parts.hostname}"


def _mend(name: str, *, in_environment: bool) -> str:
    if in_environment:
        return 'eval "$(phi3 env)", or set PHI3_ENDPOINT and PHI3_KEY by hand'
    return (
        f"phi3 connect connection.name={name}, or pf connection update --name {name}"
        " --set configs.endpoint=URL secrets.key=KEY"
    )
