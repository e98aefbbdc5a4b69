"""Tests of the agent: they run in the environment that has Agent Framework (`make agent`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

pytest.importorskip("agent_framework", reason="Agent Framework is in .venv-agent: make agent")

from tests.agent.recorded import Endpoint

from phi3_training.agent.recorder import Recorder, Reply


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    """`endpoint(row=[Reply(…)])` starts one; without a script it answers about the question."""
    with ExitStack() as running:

        def start(**scripts: list[Reply]) -> Endpoint:
            return Endpoint(running.enter_context(Recorder(scripts).running()))

        yield start
