"""OpenAI's chat API: `/v1/chat/completions`, `/chat/completions`, `/v1/models`.

Reads and answers OpenAI's JSON, streaming as server-sent events. Errors below `/v1/` are OpenAI's,
those of `/chat/completions` are Azure's. Ranges are those of the Azure
images (temperature 0 to 1), so that what works here works there.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Receive, Scope, Send

from .config import ServerConfig
from .engines.base import (
    Chunk,
    Engine,
    EngineError,
    InvalidPromptError,
    PromptTooLongError,
    Sampling,
    UnknownModelError,
    pick,
)
from .openai_errors import is_openai, openai_error
from .score_api import ChunkShape, completion, error_body, gather

Penalty = Annotated[float, Field(ge=-2, le=2)]
# Standard fields that change nothing here; every OpenAI client may send them.
_HARMLESS = frozenset({"user", "n", "logprobs", "store", "metadata", "service_tier", "seed"})


class TextPart(BaseModel):
    """A piece of a message's content; only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message; `developer` is OpenAI's newer name for `system`."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """Role and content as the model's chat template knows them."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class StreamOptions(BaseModel):
    """What a stream carries in addition to the text."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request; `extra="allow"` keeps unknown fields for `unsupported` to judge."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    model: str | None = None
    # 0 to 1, as Azure's images check it; OpenAI's own API takes 0 to 2.
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def conversation(self) -> list[dict[str, str]]:
        """The messages for the engine."""
        return [message.plain() for message in self.messages]

    def sampling(self, default_length: int) -> Sampling:
        """How the answer is to be chosen. Vendor fields of vLLM are understood as well."""
        extra = self.model_extra or {}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or default_length,
            temperature=self.temperature,
            top_p=self.top_p or None,  # 0 would keep no token: taken as not set
            top_k=extra["top_k"] if isinstance(extra.get("top_k"), int) else None,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=tuple(stop),
            ignore_eos=extra.get("ignore_eos") is True,
            seed=self.seed,
        )


def unsupported(asked: ChatRequest, extras: str) -> str | None:
    """Why a valid request cannot be served, or None. `extras` is the extra-parameters header."""
    if asked.tools or asked.tool_choice not in (None, "none"):
        return "tools are not supported by this model's endpoint"
    kind = (asked.response_format or {}).get("type", "text")
    if kind != "text":
        return "response_format other than text is not supported by this model's endpoint"
    unknown = sorted(set(asked.model_extra or ()) - _HARMLESS)
    if unknown and extras == "error":
        names = ", ".join(unknown)
        return (
            f"extra parameters are not allowed when extra-parameters is not set or set to "
            f"'error': {names}"
        )
    return None


Stream = AsyncGenerator[Chunk, None]

# What OpenAI's API calls an engine's error: the field at fault and a code.
_NAMED: dict[type[EngineError], tuple[str, str | None]] = {
    UnknownModelError: ("model", "model_not_found"),
    PromptTooLongError: ("messages", "context_length_exceeded"),
    InvalidPromptError: ("messages", None),
}


def add_openai(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """Register the routes."""
    started = int(time.time())

    about = {"object": "model", "created": started, "owned_by": "phi3-promptflow"}

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        names = [config.model_name, *config.adapters]
        return {"object": "list", "data": [{"id": name, **about} for name in names]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        if name not in (config.model_name, *config.adapters):
            served = ", ".join([config.model_name, *config.adapters])
            message = f"The model {name!r} does not exist; models: {served}"
            body = openai_error(404, message, param="model", code="model_not_found")
            return JSONResponse(body, 404)
        return JSONResponse({"id": name, **about})

    @app.post("/v1/chat/completions")
    async def chat_v1(request: Request) -> Response:
        return await _chat(request, engine, config, extras="drop")

    @app.post("/chat/completions")
    async def chat(request: Request) -> Response:
        # Where the header is missing, the older image takes it for "error", the newer one lets
        # everything through.
        unset = "error" if config.dialect == "loi" else "pass-through"
        extras = request.headers.get("extra-parameters", unset)
        return await _chat(request, engine, config, extras=extras)


async def _chat(request: Request, engine: Engine, config: ServerConfig, extras: str) -> Response:
    openai = is_openai(request.url.path)
    try:
        asked = ChatRequest.model_validate_json(await request.body())
    except ValidationError as error:
        # Without the input: an error must not repeat the caller's conversation.
        details = [
            {"loc": list(fault["loc"]), "msg": fault["msg"], "type": fault["type"]}
            for fault in error.errors(include_input=False, include_url=False, include_context=False)
        ]
        first_fault = details[0]
        where = ".".join(map(str, first_fault["loc"]))
        message = f"{where or 'body'}: {first_fault['msg']}"
        if openai:
            return JSONResponse(openai_error(400, message, param=where or None), 400)
        # Azure's images: 422, with every fault.
        body = error_body("Invalid input", 422, f"invalid input error: {message}", details)
        return JSONResponse(body, 422)
    if refused := unsupported(asked, extras):
        body = openai_error(400, refused) if openai else error_body("Bad Request", 400, refused)
        return JSONResponse(body, 400)
    sampling = asked.sampling(config.max_new_tokens)
    # The model that a request names: as a deployment, or else in its body.
    deployment = request.headers.get("azureml-model-deployment")
    wanted = deployment if deployment in config.adapters else asked.model
    name = wanted if wanted in config.adapters else config.model_name
    try:
        chosen = pick(engine, wanted)
        if asked.stream:
            stream = chosen.stream(asked.conversation(), sampling)
            first = await anext(stream)  # until it has come, errors have a status
            shape = ChunkShape(name)
            return _Events(stream, first, shape, wants_usage=asked.wants_usage, openai=openai)
        answer = await gather(chosen, asked.conversation(), sampling)
    except EngineError as error:
        return JSONResponse(_error(error, openai=openai), error.status)
    return JSONResponse(completion(name, answer.text, answer.last))


class _Events(StreamingResponse):
    """Server-sent events of one answer; however it ends, the engine's stream is closed."""

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: Stream,
        first: Chunk,
        shape: ChunkShape,
        *,
        wants_usage: bool,
        openai: bool,
    ) -> None:
        self._stream = stream

        async def events() -> AsyncGenerator[str, None]:
            # The role comes once, before any text, as OpenAI's own stream has it.
            yield _event(shape.piece({"role": "assistant", "content": ""}))
            chunk = first
            try:
                while chunk.finish_reason is None:
                    yield _event(shape.piece({"content": chunk.text}))
                    chunk = await anext(stream)
            except EngineError as error:
                yield _event(_error(error, openai=openai))
                return
            if chunk.text:
                yield _event(shape.piece({"content": chunk.text}))
            yield _event(shape.piece({}, chunk.finish_reason))
            if wants_usage:
                yield _event(shape.figures(chunk))
            yield "data: [DONE]\n\n"

        super().__init__(events(), headers={"cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A client that leaves cancels the response; the engine's row must not wait for the garbage
        # collector to close the stream.
        async with aclosing(self._stream):
            await super().__call__(scope, receive, send)


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(error: EngineError, *, openai: bool) -> dict[str, object]:
    if openai:
        named = (names for kind, names in _NAMED.items() if isinstance(error, kind))
        param, code = next(named, (None, None))
        return openai_error(error.status, str(error), param=param, code=code)
    kind = "Bad Request" if error.status == 400 else "Engine Error"
    return error_body(kind, error.status, str(error))
