"""`POST /score`: the request format of the MLflow foundation models on Azure ML.

Failures come back as status 200, as on Azure; the header `x-phi3-reason` says in plain words what
they mean.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .config import ServerConfig
from .engines.base import Chunk, Engine, EngineError, InvalidPromptError, Sampling, pick

# ---- parameters of a request: to a `Sampling`, as the two Azure images do it

# The `loi` image translates names and drops what it does not know; the `fms` image hands them to an
# OpenAI-style engine unchanged, so that `max_new_tokens` and `do_sample` do nothing there.

# Weakest first: each later name overwrites the ones before.
_LENGTH_NAMES = {"loi": ("max_tokens", "max_new_tokens", "max_gen_len"), "fms": ("max_tokens",)}


class BadParameterError(InvalidPromptError):
    """A parameter has a value that it cannot have."""


class _Known(BaseModel):
    model_config = ConfigDict(extra="ignore")

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)


def score_sampling(parameters: Mapping[str, Any], dialect: str, default_length: int) -> Sampling:
    """The sampling that `parameters` ask for; BadParameterError for a value that cannot be."""
    # A null counts as not given: clients write their whole table of settings.
    given = {name: value for name, value in parameters.items() if value is not None}
    for name in _LENGTH_NAMES[dialect]:
        if name in given:
            given["max_tokens"] = given[name]
    if dialect == "loi":
        if given.get("do_sample") is False:
            given["temperature"] = 0.0
        # The image's own translation; the engine's name is stop_token_ids.
        eos = given.get("eos_token_id")
        if eos is not None and "stop_token_ids" not in given:
            given["stop_token_ids"] = eos if isinstance(eos, list) else [eos]
    try:
        known = _Known.model_validate(given)
    except ValidationError as error:
        faults = [f"{e['loc'][0]}: {e['msg']}" for e in error.errors(include_input=False)]
        raise BadParameterError(f"bad parameters: {'; '.join(faults)}") from None
    stop = [known.stop] if isinstance(known.stop, str) else known.stop or []
    return Sampling(
        max_new_tokens=known.max_tokens or default_length,
        temperature=known.temperature,
        top_p=known.top_p,
        # -1 is vLLM's way to say "all of them".
        top_k=None if known.top_k is None else max(0, known.top_k),
        presence_penalty=known.presence_penalty,
        frequency_penalty=known.frequency_penalty,
        stop=tuple(stop),
        stop_token_ids=tuple(known.stop_token_ids or ()),
        ignore_eos=known.ignore_eos,
        seed=known.seed,
    )


# ---- shapes that both APIs answer with: usage, ids, errors, `chat.completion` objects


def answer_id() -> str:
    """A fresh id for an answer."""
    return f"chatcmpl-{secrets.token_hex(12)}"


def usage(chunk: Chunk) -> dict[str, int]:
    """The token counts of an answer, from its last chunk."""
    return {
        "prompt_tokens": chunk.prompt_tokens,
        "completion_tokens": chunk.completion_tokens,
        "total_tokens": chunk.prompt_tokens + chunk.completion_tokens,
    }


def error_body(code: str, status: int, message: str, details: object = None) -> dict[str, object]:
    """An error as the Azure images write it."""
    error: dict[str, object] = {"code": code, "status": status, "message": message}
    if details is not None:
        error["details"] = details
    return {"error": error}


def completion(model: str, text: str, last: Chunk) -> dict[str, object]:
    """A whole answer in OpenAI's shape."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": last.finish_reason}
    return {
        "id": answer_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": usage(last),
    }


class ChunkShape:
    """The events of one streamed answer in OpenAI's shape."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": answer_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def piece(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, object]:
        """An event with a piece of the answer."""
        return {
            **self._head,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
        }

    def figures(self, last: Chunk) -> dict[str, object]:
        """The event with the token counts."""
        return {**self._head, "choices": [], "usage": usage(last)}


# ---- a body and its answer: for the server and the Azure script alike, so without a web framework

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """A whole answer: its text and the last chunk's figures."""

    text: str
    last: Chunk


class BadBodyError(ValueError):
    """The body has not the shape that the route reads; the text names the field, not its value."""


async def gather(engine: Engine, messages: Messages, sampling: Sampling) -> Answer:
    """The whole answer of an engine."""
    parts: list[str] = []
    last = Chunk("")
    async with aclosing(engine.stream(messages, sampling)) as stream:
        async for chunk in stream:
            parts.append(chunk.text)
            last = chunk
    return Answer("".join(parts), last)


def read_score(payload: object) -> tuple[Messages, dict[str, Any]]:
    """Messages and parameters of a body; of several conversations, the first.

    Raises BadBodyError.
    """
    data = payload.get("input_data") if isinstance(payload, dict) else None
    if not isinstance(data, dict):
        raise BadBodyError('expected {"input_data": {"input_string": [...]}}')
    parameters = data.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadBodyError("input_data.parameters is not an object")
    # [[{…}]] is what Microsoft's notebook sends; the older image answers the first of several.
    conversation = data.get("input_string")
    if isinstance(conversation, list) and conversation and isinstance(conversation[0], list):
        conversation = conversation[0]
    if not isinstance(conversation, list) or not conversation:
        raise BadBodyError("input_data.input_string is not a list of messages")
    for number, message in enumerate(conversation, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BadBodyError(f"message {number} is not an object with role and content texts")
        if message.get("role") not in ("system", "user", "assistant"):
            raise BadBodyError(f"the role of message {number} is not system, user or assistant")
    return conversation, parameters


def success(answer: Answer, dialect: str, model_name: str) -> dict[str, object]:
    """The body of an answer, as the image of that dialect writes it."""
    if dialect == "loi":
        return {"output": answer.text}
    return {
        "output": answer.text,
        "message": {"role": "assistant", "content": answer.text},
        "finish_reason": answer.last.finish_reason,
        "usage": usage(answer.last),
        "model": model_name,
        "id": answer_id(),
    }


def engine_failure(error: EngineError, dialect: str) -> tuple[dict[str, object], str]:
    """The body and the reason in plain words.

    The conversation's own faults look like a bad body; the rest is the engine's answer.
    """
    reason = "the model's server refused the request" if error.echoes else str(error)
    if dialect == "fms":
        body = {"status_code": error.status, "body": error_body("error", error.status, str(error))}
        return {"output": None, "error": body}, reason
    # "None" is Python's None written as text: what the image says where its engine failed.
    # A fault of the conversation raises in the image before its engine is asked: it answers {}.
    in_template = type(error) is InvalidPromptError
    return ({} if in_template else {"output": "None"}), reason


# ---- the OpenAPI description at `/swagger.json`

_EXAMPLE = {
    "input_data": {
        "input_string": [{"role": "user", "content": "Who founded Microsoft?"}],
        "parameters": {"temperature": 0.0, "max_new_tokens": 100},
    }
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "enum": ["system", "user", "assistant"]},
        "content": {"type": "string"},
    },
}


def swagger(title: str) -> dict[str, object]:
    """The description; paths as the Azure image lists them."""
    data = {
        "type": "object",
        "required": ["input_string"],
        "properties": {
            "input_string": {"type": "array", "items": _MESSAGE},
            "parameters": {"type": "object"},
        },
    }
    schema = {"type": "object", "required": ["input_data"], "properties": {"input_data": data}}
    properties = {
        "messages": {"type": "array", "items": _MESSAGE},
        "max_tokens": {"type": "integer"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "stream": {"type": "boolean"},
    }
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "version": "1.0.0"},
        "components": {"securitySchemes": {"Bearer": {"type": "http", "scheme": "bearer"}}},
        "security": [{"Bearer": []}],
        "paths": {
            "/": {"get": _operation("health", "healthy", security=[])},
            "/score": {
                "post": _operation(
                    "score", "the answer", body={"schema": schema, "example": _EXAMPLE}
                )
            },
            "/v1/chat/completions": {
                "post": _operation(
                    "chat",
                    "the answer in OpenAI's shape",
                    body={
                        "schema": {
                            "type": "object",
                            "required": ["messages"],
                            "properties": properties,
                        }
                    },
                )
            },
        },
    }


def _operation(
    name: str, answer: str, *, body: dict[str, object] | None = None, **more: object
) -> dict[str, object]:
    operation: dict[str, object] = {
        "operationId": name,
        "responses": {"200": {"description": answer}},
        **more,
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


logger = logging.getLogger(__name__)


def add_score(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """Register the route."""

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        try:
            payload = json.loads(await request.body())
        except ValueError:  # the one failure that Azure's images do not answer with 200
            body = error_body("Internal Server Error", 500, "the body is not JSON")
            return JSONResponse(body, 500)
        try:
            messages, parameters = read_score(payload)
            sampling = score_sampling(parameters, config.dialect, config.max_new_tokens)
            chosen = pick(engine, request.headers.get("azureml-model-deployment"))
            answer = await gather(chosen, messages, sampling)
        except BadBodyError as error:
            return _failure({}, str(error))
        except EngineError as error:
            return _failure(*engine_failure(error, config.dialect))
        return JSONResponse(success(answer, config.dialect, config.model_name))


def _failure(body: dict[str, object], reason: str) -> JSONResponse:
    # A header holds ASCII without line ends; 200 characters are a sentence, not a conversation.
    plain = "".join(c if " " <= c <= "~" else " " for c in reason)[:200]
    logger.warning("/score failed as status 200: %s", plain)
    return JSONResponse(body, headers={"x-phi3-reason": plain})
