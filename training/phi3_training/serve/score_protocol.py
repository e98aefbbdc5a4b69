"""What a `/score` body means and what its answers look like: for the server and the Azure script.

Reads `{"input_data": {"input_string": [messages], "parameters": {…}}}` and asks an engine; knows no
web framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from .engines.base import Chunk, Engine, EngineError, InvalidPromptError, Sampling
from .replies import answer_id, error_body, usage

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


def success(answer: Answer, dialect: str, model_name: str) -> dict[str, Any]:
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


def engine_failure(error: EngineError, dialect: str) -> tuple[dict[str, Any], str]:
    """The body and the reason in plain words.

    The conversation's own faults look like a bad body; the rest is the engine's answer.
    """
    reason = "the model's server refused the request" if error.echoes else str(error)
    if dialect == "fms":
        body = {"status_code": error.status, "body": error_body("error", error.status, str(error))}
        return {"output": None, "error": body}, reason
    in_template = type(error) is InvalidPromptError
    return ({} if in_template else {"output": "None"}), reason
