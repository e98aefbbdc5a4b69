"""The order of the checks, and what is skipped when an earlier one failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from phi3_tool.connection import ConnectionSettings

from ..errors import UsageError
from ..flow.source import FlowSource, connection_of
from ..packages import Installed, installed
from .endpoint import CONNECTION, ENDPOINT, ask, connection_findings, endpoint, token_finding
from .environment import dates, environment, promptflow_home, service
from .finding import Finding, Group
from .flow import Connection, flow

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
    # The endpoint of the run where there is no Prompt flow, and so no connection; a StageError or
    # UsageError says why there is none.
    without_store: Callable[[], ConnectionSettings] | None = None


def examine(setup: Setup) -> Iterator[Finding]:
    """Every finding, as soon as it is there; none of them holds the key."""
    yield from environment(setup.version_of)
    yield from service(promptflow_home(), setup.folder, setup.version_of)
    try:
        named = setup.connection or connection_of(FlowSource.read(setup.flow).dag)
    except UsageError:  # the checks of the flow say why
        named = None
    there = setup.version_of("promptflow") is not None
    connection = Connection(
        named or DEFAULT_CONNECTION,
        None if there else setup.without_store,
        chosen=setup.connection is not None,
    )

    # Called for each finding, because the key is known only after the connection was read.
    def scrub(text: str) -> str:
        # An endpoint or a library may have quoted the key.
        key = connection.settings.key if connection.settings else ""
        return text.replace(key, "***") if key else text

    def asked() -> Iterator[Finding]:
        settings = connection.settings
        if settings is None:
            for group, checks in ((CONNECTION, ("key", "dialect", "deployment")),
                                  (ENDPOINT, ("health", "latency", "one token"))):  # fmt: skip
                for check in checks:
                    yield group.skipped(check, connection.why_not)
            return
        answer = ask(settings, setup.seconds)
        yield from connection_findings(answer)
        # Ten seconds for a round trip, however long a question may take.
        yield from endpoint(settings, min(setup.seconds, 10.0), setup.slow_ms)
        yield token_finding(answer)

    # A chain of generators: the connection's settings are there once its checks have run.
    for finding in chain(
        connection.checks(),
        asked(),
        flow(setup.flow, promptflow_there=there),
    ):
        yield finding.changed(scrub)
    yield from dates()
    # Checks that take longer and are run only when named.
    tool, tokens = "builds the package, which takes longer", "compares training with serving, "
    yield Group("flow").skipped("wheel", tool, "phi3 doctor --tool")
    yield Group("model").skipped("tokens", tokens + "which takes longer", "phi3 doctor --tokens")
