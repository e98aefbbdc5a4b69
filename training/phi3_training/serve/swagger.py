"""The OpenAPI description that the endpoint gives at `/swagger.json`."""

from __future__ import annotations

from typing import Any

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


def swagger(title: str) -> dict[str, Any]:
    """The description; paths as the Azure image lists them."""
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "version": "1.0.0"},
        "components": {"securitySchemes": {"Bearer": {"type": "http", "scheme": "bearer"}}},
        "security": [{"Bearer": []}],
        "paths": {
            "/": {"get": _operation("health", "healthy", security=[])},
            "/score": {"post": _operation("score", "the answer", body=_score_schema())},
            "/v1/chat/completions": {
                "post": _operation("chat", "the answer in OpenAI's shape", body=_chat_schema())
            },
        },
    }


def _operation(
    name: str, answer: str, *, body: dict[str, Any] | None = None, **more: object
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "responses": {"200": {"description": answer}},
        **more,
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": body}}
    return operation


def _score_schema() -> dict[str, Any]:
    data = {
        "type": "object",
        "required": ["input_string"],
        "properties": {
            "input_string": {"type": "array", "items": _MESSAGE},
            "parameters": {"type": "object"},
        },
    }
    schema = {"type": "object", "required": ["input_data"], "properties": {"input_data": data}}
    return {"schema": schema, "example": _EXAMPLE}


def _chat_schema() -> dict[str, Any]:
    properties = {
        "messages": {"type": "array", "items": _MESSAGE},
        "max_tokens": {"type": "integer"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1},
        "stream": {"type": "boolean"},
    }
    return {"schema": {"type": "object", "required": ["messages"], "properties": properties}}
