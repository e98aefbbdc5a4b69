"""`phi3 agent serve`: the agent over HTTP, in OpenAI's two shapes and in the flow's own.

POST /v1/chat/completions, /v1/responses (both with `stream`) and /score (the flow's inputs, as
`pf flow serve` takes them); GET /v1/models and /health. Clients send the key of this server, which
is not the endpoint's. A request knows only what it brings, or names with previous_response_id.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import uvicorn
from agent_framework import Agent, AgentResponse, Message
from agent_framework.exceptions import AgentFrameworkException
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from phi3_tool.errors import (
    EndpointTimeoutError,
    Phi3Error,
    RequestRejectedError,
    ThrottledError,
)
from phi3_tool.wire import read_turns

from .client import Phi3ChatClient, answer_text, phi3_error
from .conversation import Conversations
from .openai_shapes import (
    Asked,
    ChunkWriter,
    ResponseWriter,
    completion,
    read_chat,
    read_responses,
    sse,
    stored,
    system_of,
)
from .workflow import FlowInputs, RagInputs, create_rag_workflow, create_workflow, run_flow
from .workflow import stream_flow as stream_workflow

log = logging.getLogger(__name__)

#: The key that clients of this server send.
KEY = "PHI3_AGENT_KEY"
#: No conversation that fits a model comes near this.
MAX_BODY = 4 * 1024 * 1024
#: Pieces that are read ahead of a slow client; then the agent's stream waits for it.
_WAITING = 64
FAILURES = (AgentFrameworkException, Phi3Error)
_STATUS = ((RequestRejectedError, 400), (ThrottledError, 429), (EndpointTimeoutError, 504))
# Without the second one nginx collects a whole response before it sends any of it.
_SSE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _NoSuchResponseError(RequestRejectedError):
    """previous_response_id names no conversation that is kept."""


class Served:
    """The routes. `agent` has no memory; `conversations` keeps what Responses refers back to."""

    def __init__(
        self,
        agent: Agent[Any],
        conversations: Conversations,
        *,
        documents: Path | None = None,
    ) -> None:
        self._agent = agent
        self._conversations = conversations
        self._documents = documents
        self._model = agent.name or "phi3"

    def app(self, key: str) -> Starlette:
        """The application; every route but /health asks for `key` as a Bearer token."""

        async def fail(_request: Request, error: Exception) -> Response:
            status, shown = _shown(error)
            return JSONResponse({"error": shown}, status)

        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/responses", self.responses, methods=["POST"]),
                Route("/score", self.score, methods=["POST"]),
            ],
            middleware=[Middleware(_Guard, key=key)],
            exception_handlers=dict.fromkeys(FAILURES, fail),
        )

    async def health(self, _request: Request) -> Response:
        """The process is up; the model's endpoint is not asked."""
        return JSONResponse({"status": "ok", "agent": self._model})

    async def models(self, _request: Request) -> Response:
        """The agent under its name."""
        about = {"id": self._model, "object": "model", "created": 0, "owned_by": "phi3"}
        return JSONResponse({"object": "list", "data": [about]})

    async def chat(self, request: Request) -> Response:
        """Chat completions, whole or streamed."""
        asked = read_chat(await _json(request))
        if asked.stream:
            return await _streaming(self._chunks(asked))
        response = await self._answer(asked)
        finish = str(response.finish_reason or "stop")
        text, usage = answer_text(response.messages), response.usage_details or {}
        return JSONResponse(completion(text, self._model, finish, usage))

    async def responses(self, request: Request) -> Response:
        """Responses, whole or streamed; kept under its id unless `store` is false."""
        asked = read_responses(await _json(request))
        turns: list[Mapping[str, Any]] = []
        if asked.previous is not None:
            known = self._conversations.read(asked.previous)
            if known is None:
                raise _NoSuchResponseError(
                    f"There is no response {asked.previous!r:.80} any more: send the whole "
                    "conversation as input"
                )
            turns = known
        writer = ResponseWriter(self._model, asked)
        if asked.stream:
            return await _streaming(self._events(asked, turns, writer))
        response = await self._answer(asked, turns)
        text = answer_text(response.messages)
        self._keep(asked, turns, writer.id, text)
        return JSONResponse(writer.whole(text, response.usage_details or {}))

    async def score(self, request: Request) -> Response:
        """The flow's inputs in, {"answer": …} out, as `pf flow serve` has it."""
        body = await _json(request)
        kind = FlowInputs if self._documents is None else RagInputs
        # A client of the server must not name files of this machine.
        known = set(kind.__dataclass_fields__) - {"index"}
        if not isinstance(body, Mapping) or not isinstance(body.get("input_data"), str):
            raise RequestRejectedError("The request must have the question as text in input_data")
        unknown = sorted(set(body) - known)
        if unknown:
            raise RequestRejectedError(
                f"The flow has no input {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            )
        inputs = kind(**{name: value for name, value in body.items() if value is not None})
        # One workflow per request: an instance refuses two runs at once, and may keep a history.
        client = cast(Phi3ChatClient, self._agent.client)
        workflow = (
            create_workflow(client)
            if self._documents is None
            else create_rag_workflow(client, self._documents)
        )
        if "text/event-stream" in request.headers.get("accept", ""):
            pieces = stream_workflow(workflow, inputs)
            return await _streaming(sse({"answer": piece}) async for piece in pieces)
        return JSONResponse({"answer": await run_flow(workflow, inputs)})

    def _run(self, asked: Asked, turns: list[Mapping[str, Any]], *, stream: bool) -> Any:
        # The earlier turns come between the request's own system messages and the rest of it.
        sent = asked.messages
        first = next((i for i, m in enumerate(sent) if m["role"] != "system"), len(sent))
        earlier = [
            {"role": role, "content": text}
            for question, answer in read_turns(turns)
            for role, text in (("user", question), ("assistant", answer))
        ]
        sent = [*sent[:first], *system_of(turns), *earlier, *sent[first:]]
        messages = [Message(m["role"], [m["content"]]) for m in sent]
        return self._agent.run(messages, stream=stream, options=asked.options)  # type: ignore[call-overload]

    async def _answer(
        self, asked: Asked, turns: list[Mapping[str, Any]] | None = None
    ) -> AgentResponse[Any]:
        response: AgentResponse[Any] = await self._run(asked, turns or [], stream=False)
        return response

    async def _chunks(self, asked: Asked) -> AsyncIterator[str]:
        writer, finish = ChunkWriter(self._model), "stop"
        first = True
        try:
            async for update in self._run(asked, [], stream=True):
                if update.text:
                    role = {"role": "assistant"} if first else {}
                    first = False
                    yield writer.piece({**role, "content": update.text})
                finish = str(update.finish_reason or finish)
        except FAILURES as error:
            if first:  # nothing was sent yet: `_streaming` gives the error a status of its own
                raise
            yield sse({"error": _shown(error)[1]})
        else:
            yield writer.piece({}, finish)
        yield "data: [DONE]\n\n"

    async def _events(
        self, asked: Asked, turns: list[Mapping[str, Any]], writer: ResponseWriter
    ) -> AsyncIterator[str]:
        pieces: list[str] = []
        try:
            async for update in self._run(asked, turns, stream=True):
                if update.text:
                    if not pieces:
                        yield writer.begin()
                    pieces.append(update.text)
                    yield writer.piece(update.text)
        except FAILURES as error:
            if not pieces:
                raise
            yield writer.failed(_shown(error)[1])
            return
        if not pieces:
            yield writer.begin()
        text = "".join(pieces)
        self._keep(asked, turns, writer.id, text)
        yield writer.end(text, {})

    def _keep(self, asked: Asked, turns: list[Mapping[str, Any]], name: str, answer: str) -> None:
        # Under its own id, with all turns before it: a client may go on from any answer, as in
        # OpenAI's API.
        if asked.store:
            messages = [*asked.messages, {"role": "assistant", "content": answer}]
            new = stored(messages, asked.facts.get("instructions"))
            self._conversations.append(name, [*turns, *new])


class _Guard:
    """Lets requests with the key pass, up to MAX_BODY; /health is open."""

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            headers = dict(scope["headers"])
            # In constant time: how much of a guess is right must not show in the time taken.
            if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
                why = f"the key is missing or wrong: send the server's {KEY} as a Bearer token"
                refusal = JSONResponse({"error": _error(why, "invalid_api_key", 401)}, 401)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def serve(
    agent: Agent[Any], conversations: Conversations, *, host: str, port: int, rag: bool = False
) -> int:
    """Serve until Ctrl-C. The key comes from PHI3_AGENT_KEY, else one is made and shown."""
    key = os.environ.get(KEY, "").strip()
    if not key:
        key = secrets.token_urlsafe(32)
        sys.stderr.write(f"{KEY} is not set; generated a key for this server, shown only here:\n")
        sys.stderr.write(f"  {key}\n")
    app = Served(agent, conversations, documents=Path() if rag else None).app(key)
    sys.stderr.write(
        f"Agent at http://{host}:{port}/v1 (chat/completions and responses) and "
        f"http://{host}:{port}/score, until Ctrl-C\n"
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
    return 0


async def _json(request: Request) -> object:
    # Counted as it comes: the declared length is the client's word.
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise RequestRejectedError(f"The request has more than {MAX_BODY >> 20} MiB")
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise RequestRejectedError("The request is not JSON") from None


async def _streaming(pieces: AsyncIterator[str]) -> Response:
    """The stream, once its first piece is there: until then an error has a status of its own.

    One task reads the agent's stream from its beginning to its end, because the framework's traces
    belong to the task that began it; the web server may send from another one.
    """
    queue: asyncio.Queue[str | Exception | None] = asyncio.Queue(_WAITING)

    async def read() -> None:
        try:
            async for piece in pieces:
                await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - raised again below
            await queue.put(error)

    reading = asyncio.create_task(read())
    first = await queue.get()
    if isinstance(first, Exception):
        raise first

    async def all_of_them() -> AsyncIterator[str]:
        try:
            piece: str | Exception | None = first
            while piece is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                piece = await queue.get()
        finally:
            reading.cancel()  # the client may have gone

    return StreamingResponse(all_of_them(), media_type="text/event-stream", headers=_SSE)


def _shown(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and error object. What did not come from phi3_tool is described in the log alone."""
    failure = phi3_error(error)
    if failure is None:
        log.error("a request failed", exc_info=error)
        return 500, _error("the agent failed; its log says why", "server_error")
    # The endpoint's 401 is not the caller's: the key sent to this server was right.
    status = next((code for kind, code in _STATUS if isinstance(failure, kind)), 502)
    code = type(failure).__name__
    if isinstance(failure, _NoSuchResponseError):
        code = "previous_response_not_found"
    return status, _error(str(failure), code, status)


def _error(message: str, code: str, status: int = 500) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "code": code, "param": None}
