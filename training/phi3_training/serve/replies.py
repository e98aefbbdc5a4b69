"""Shapes that both APIs answer with: usage, ids, errors, `chat.completion` objects."""

from __future__ import annotations

import secrets
import time
from typing import Any

from .engines.base import Chunk


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


def error_body(code: str, status: int, message: str, details: object = None) -> dict[str, Any]:
    """An error as the Azure images write it."""
    error: dict[str, Any] = {"code": code, "status": status, "message": message}
    if details is not None:
        error["details"] = details
    return {"error": error}


def completion(model: str, text: str, last: Chunk) -> dict[str, Any]:
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

    def piece(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """An event with a piece of the answer."""
        return {
            **self._head,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
        }

    def figures(self, last: Chunk) -> dict[str, Any]:
        """The event with the token counts."""
        return {**self._head, "choices": [], "usage": usage(last)}
