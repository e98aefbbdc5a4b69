"""A recording endpoint for the tests of the agent, and what waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from phi3_agent import Phi3ChatClient
from phi3_training.agent.recorder import Dialect, Recorder

KEY = "the-endpoints-secret"


class Endpoint:
    """A recording endpoint with one script per row; clients of it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def url(self, row: str, dialect: Dialect = "score") -> str:
        return self._recorder.address("agent", row, dialect)

    def client(self, row: str, dialect: Dialect = "score", **settings: Any) -> Phi3ChatClient:
        connection = {"endpoint": self.url(row, dialect), "key": KEY, **settings}
        return Phi3ChatClient(connection=connection)

    def bodies(self, row: str) -> list[bytes]:
        return [request.body for request in self._recorder.requests("agent", row)]


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """What an asynchronous test waits for."""
    return asyncio.run(asyncio.wait_for(work, 60))
