"""`POST /score`: the request format of the MLflow foundation models on Azure ML.

Reads `{"input_data": {"input_string": [messages], "parameters": {…}}}`. Failures come back as
status 200, as on Azure; the header `x-phi3-reason` says in plain words what they mean.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from .config import ServerConfig
from .engines.base import (
    Chunk,
    Engine,
    EngineError,
    InvalidPromptError,
    Sampling,
)
from .engines.named import pick
from .parameters import score_sampling
from .replies import answer_id, error_body, usage

logger = logging.getLogger(__name__)

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """A whole answer: its text and the last chunk's figures."""

    text: str
    last: Chunk


class BadBodyError(ValueError):
    """The body has not the shape that the route reads; the text names the field, not its value."""


def add_score(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """Register the route."""

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        try:
            payload = json.loads(await request.body())
        except ValueError:
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
            return _engine_failure(error, config.dialect)
        return JSONResponse(_success(answer, config))


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


def _success(answer: Answer, config: ServerConfig) -> dict[str, Any]:
    if config.dialect == "loi":
        return {"output": answer.text}
    return {
        "output": answer.text,
        "message": {"role": "assistant", "content": answer.text},
        "finish_reason": answer.last.finish_reason,
        "usage": usage(answer.last),
        "model": config.model_name,
        "id": answer_id(),
    }


def _engine_failure(error: EngineError, dialect: str) -> JSONResponse:
    """The conversation's own faults look like a bad body; the rest is the engine's answer."""
    reason = "the model's server refused the request" if error.echoes else str(error)
    if dialect == "fms":
        body = {"status_code": error.status, "body": error_body("error", error.status, str(error))}
        return _failure({"output": None, "error": body}, reason)
    in_template = type(error) is InvalidPromptError
    return _failure({} if in_template else {"output": "None"}, reason)


def _failure(body: dict[str, Any], reason: str) -> JSONResponse:
    plain = "".join(c if " " <= c <= "~" else " " for c in reason)[:200]
    logger.warning("/score failed as status 200: %s", plain)
    return JSONResponse(body, headers={"x-phi3-reason": plain})
