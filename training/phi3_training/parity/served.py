"""The serving side: golden conversations sent through the server's own code, without weights.

A request goes the whole way (client, JSON, route, chat format, batcher); a recorder stands in the
model's place and keeps the ids that it is handed. Reads the served folder's format only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from phi3_tool.history import from_messages, to_messages
from phi3_tool.wire import build_request

from ..serve.app import create_container
from ..serve.azure_score import Scorer
from ..serve.config import ServerConfig
from ..serve.engines.base import Engine
from ..serve.engines.sampling import Logits
from ..serve.engines.upstream import Upstream
from .golden import Case, Messages

_SCORE, _OPENAI = "/score", "/v1/chat/completions"
# Enough for an answer that stops at once; one that does not stop ends with "length".
_TOKENS = 4


class Recorder:
    """A step model that keeps the prompts it is handed and says `end` for ever."""

    def __init__(self, end: int) -> None:
        self.prompts: list[list[int]] = []
        self._logits: Logits = np.zeros((1, end + 1), np.float32)
        self._logits[0, end] = 1.0

    def has_room(self, length: int) -> bool:  # noqa: ARG002 - the protocol's signature
        """Always: nothing is computed."""
        return True

    def add(self, ids: Sequence[int], length: int) -> Logits:  # noqa: ARG002 - see has_room
        """Keep the prompt."""
        self.prompts.append(list(ids))
        logits: Logits = self._logits[0]
        return logits

    def step(self, tokens: Sequence[int]) -> Logits:
        """One more token for every row."""
        return np.repeat(self._logits, len(tokens), axis=0)

    def drop(self, row: int) -> None:
        """Nothing is held."""

    def reset(self) -> None:
        """Nothing is held."""


class RequestRefusedError(Exception):
    """The server answered no; the text is its reason."""


async def flow_asks(engine: Engine, messages: Messages) -> str:
    """Ask as the flow does: history and question to messages, `/score` body, server."""
    return _why_ended(await _post(engine, _SCORE, _flow_body(messages)))


async def script_asks(engine: Engine, messages: Messages) -> str:
    """The same body, to the script that an Azure deployment runs."""
    body = json.dumps(_flow_body(messages))
    return _why_ended(await asyncio.to_thread(_through_script, engine, body))


def _through_script(engine: Engine, body: str) -> dict[str, Any]:
    with Scorer(engine) as scorer:
        return scorer.run(body)


def _flow_body(messages: Messages) -> dict[str, Any]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = messages[:-1] if system is None else messages[1:-1]
    asked = to_messages(from_messages(turns), messages[-1]["content"], system)
    return build_request("score", asked, {"max_new_tokens": _TOKENS, "temperature": 0.0})


def _why_ended(answer: dict[str, Any]) -> str:
    if not isinstance(answer.get("finish_reason"), str):
        raise RequestRefusedError(str(answer.get("reason") or answer))
    return str(answer["finish_reason"])


async def client_asks(engine: Engine, messages: Messages) -> str:
    """Ask as an OpenAI client does; the reason why the answer ended."""
    asked = {"max_new_tokens": _TOKENS, "temperature": 0.0}
    answer = await _post(engine, _OPENAI, build_request("openai", messages, asked))
    try:
        return str(answer["choices"][0]["finish_reason"])
    except (KeyError, IndexError, TypeError):
        raise RequestRefusedError(json.dumps(answer)[:300]) from None


async def forwarded(case: Case) -> Messages:
    """The messages that the `upstream` engine hands to the server behind it."""
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        event = {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}
        return httpx.Response(200, text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    transport = httpx.MockTransport(answer)
    engine = Upstream("http://upstream.invalid/v1", "m", None, transport=transport)
    try:
        await client_asks(engine, case.messages)
    finally:
        await engine.close()
    return tuple(bodies[0]["messages"])


async def _post(engine: Engine, route: str, body: dict[str, Any]) -> dict[str, Any]:
    # This dialect's answers say why they ended; requests are read alike in both.
    container = create_container(engine, ServerConfig(dialect="fms"))
    transport = httpx.ASGITransport(container)
    async with httpx.AsyncClient(transport=transport, base_url="http://phi3") as client:
        response = await client.post(route, json=body)
    found = response.json()
    content: dict[str, Any] = found if isinstance(found, dict) else {}
    return {"reason": response.headers.get("x-phi3-reason"), **content}
