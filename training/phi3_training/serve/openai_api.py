"""OpenAI's chat API: `/v1/chat/completions`, `/chat/completions`, `/v1/models`.

Reads and answers OpenAI's JSON, streaming as server-sent events. Ranges are those of the Azure
images (temperature 0 to 1), so that what works here works there.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from .asgi import Receive, Scope, Send
from .config import ServerConfig
from .engines.base import Chunk, Engine, EngineError
from .engines.named import pick
from .openai_body import ChatRequest, unsupported
from .replies import ChunkShape, completion, error_body
from .score_protocol import gather

Stream = AsyncGenerator[Chunk, None]


def add_openai(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """Register the routes."""
    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {"object": "model", "created": started, "owned_by": "phi3-promptflow"}
        names = [config.model_name, *config.adapters]
        return {"object": "list", "data": [{"id": name, **about} for name in names]}

    @app.post("/v1/chat/completions")
    async def chat_v1(request: Request) -> Response:
        return await _chat(request, engine, config, extras="drop")

    @app.post("/chat/completions")
    async def chat(request: Request) -> Response:
        unset = "error" if config.dialect == "loi" else "pass-through"
        extras = request.headers.get("extra-parameters", unset)
        return await _chat(request, engine, config, extras=extras)


async def _chat(request: Request, engine: Engine, config: ServerConfig, extras: str) -> Response:
    try:
        asked = ChatRequest.model_validate_json(await request.body())
    except ValidationError as error:
        return _invalid(error)
    if refused := unsupported(asked, extras):
        return JSONResponse(error_body("Bad Request", 400, refused), 400)
    sampling = asked.sampling(config.max_new_tokens)
    wanted = _wanted(request, asked, config)
    name = wanted if wanted in config.adapters else config.model_name
    try:
        chosen = pick(engine, wanted)
        if asked.stream:
            return await _streamed(chosen.stream(asked.conversation(), sampling), asked, name)
        answer = await gather(chosen, asked.conversation(), sampling)
    except EngineError as error:
        return JSONResponse(_error(error), error.status)
    return JSONResponse(completion(name, answer.text, answer.last))


def _wanted(request: Request, asked: ChatRequest, config: ServerConfig) -> str | None:
    """The model that a request names: as a deployment, or else in its body."""
    deployment = request.headers.get("azureml-model-deployment")
    return deployment if deployment in config.adapters else asked.model


async def _streamed(stream: Stream, asked: ChatRequest, name: str) -> Response:
    """A streaming response, once the first chunk has come: until then errors have a status."""
    first = await anext(stream)
    return _Events(stream, first, ChunkShape(name), wants_usage=asked.wants_usage)


class _Events(StreamingResponse):
    """Server-sent events of one answer; however it ends, the engine's stream is closed."""

    media_type = "text/event-stream"

    def __init__(
        self, stream: Stream, first: Chunk, shape: ChunkShape, *, wants_usage: bool
    ) -> None:
        self._stream = stream
        events = _events(stream, first, shape, wants_usage)
        super().__init__(events, headers={"cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._stream):
            await super().__call__(scope, receive, send)


async def _events(
    stream: Stream, first: Chunk, shape: ChunkShape, wants_usage: bool
) -> AsyncGenerator[str, None]:
    yield _event(shape.piece({"role": "assistant", "content": ""}))
    chunk = first
    try:
        while chunk.finish_reason is None:
            yield _event(shape.piece({"content": chunk.text}))
            chunk = await anext(stream)
    except EngineError as error:
        yield _event(_error(error))
        return
    if chunk.text:
        yield _event(shape.piece({"content": chunk.text}))
    yield _event(shape.piece({}, chunk.finish_reason))
    if wants_usage:
        yield _event(shape.figures(chunk))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(error: EngineError) -> dict[str, Any]:
    code = "Bad Request" if error.status == 400 else "Engine Error"
    return error_body(code, error.status, str(error))


def _invalid(error: ValidationError) -> Response:
    details = [
        {"loc": list(fault["loc"]), "msg": fault["msg"], "type": fault["type"]}
        for fault in error.errors(include_input=False, include_url=False, include_context=False)
    ]
    first = details[0]
    where = ".".join(map(str, first["loc"])) or "body"
    message = f"invalid input error: {where}: {first['msg']}"
    return JSONResponse(error_body("Invalid input", 422, message, details), 422)
