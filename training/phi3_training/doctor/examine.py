"""The order of the checks, and what is skipped when an earlier one failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from phi3_tool.connection import ConnectionSettings

from ..errors import UsageError
from ..flow.bundle import FlowSource, connection_of
from ..packages import Installed, installed
from .endpoint import endpoint
from .environment import environment, promptflow_home, service
from .finding import Finding, Group
from .flow import Connection, flow
from .probe import CONNECTION, ENDPOINT, ask, connection_findings, token_finding

DEFAULT_CONNECTION = "phi3_connection"


@dataclass(frozen=True)
class Setup:
    """What is to be examined, and how patiently."""

    flow: Path
    connection: str | None = None  # else the one that the flow names
    seconds: float = 30.0
    slow_ms: float = 500.0
    folder: Path = field(default_factory=Path.cwd)
    version_of: Installed = installed


def examine(setup: Setup) -> Iterator[Finding]:
    """Every finding, as soon as it is there; none of them holds the key."""
    yield from environment(setup.version_of)
    yield from service(promptflow_home(), setup.folder, setup.version_of)
    connection = Connection(setup.connection or _named_in(setup.flow) or DEFAULT_CONNECTION)
    for finding in connection.checks():
        yield finding.changed(_scrubber(connection.settings))
    for finding in _asked(connection, setup):
        yield finding.changed(_scrubber(connection.settings))
    there = setup.version_of("promptflow") is not None
    for finding in flow(setup.flow, promptflow_there=there):
        yield finding.changed(_scrubber(connection.settings))
    yield from _left_out()


def _left_out() -> Iterator[Finding]:
    """Checks that take longer and are run only when named."""
    yield Group("flow").skipped(
        "wheel", "builds the package, which takes longer", "phi3 doctor --tool"
    )
    yield Group("model").skipped(
        "tokens", "compares training with serving, which takes longer", "phi3 doctor --tokens"
    )


def _asked(connection: Connection, setup: Setup) -> Iterator[Finding]:
    settings = connection.settings
    if settings is None:
        for group, checks in ((CONNECTION, ("key", "dialect", "deployment")),
                              (ENDPOINT, ("health", "latency", "one token"))):  # fmt: skip
            for check in checks:
                yield group.skipped(check, connection.why_not)
        return
    asked = ask(settings, setup.seconds)
    yield from connection_findings(asked)
    yield from endpoint(settings, min(setup.seconds, 10.0), setup.slow_ms)
    yield token_finding(asked)


def _named_in(folder: Path) -> str | None:
    try:
        return connection_of(FlowSource.read(folder).dag)
    except UsageError:
        return None


def _scrubber(settings: ConnectionSettings | None) -> Callable[[str], str]:
    """Takes the key out of a text, should an endpoint or a library have quoted it."""
    key = settings.key if settings else ""
    return lambda text: text.replace(key, "***") if key else text
