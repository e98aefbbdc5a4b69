"""Errors as OpenAI's API writes them, for everything below `/v1/`.

Statuses, types and codes: https://platform.openai.com/docs/guides/error-codes. `/score` and
`/chat/completions` are Azure's, with Azure's own shapes.
"""

from __future__ import annotations

PREFIX = "/v1/"

# What is served below the prefix, for clients that ask for something else.
SERVED = "POST /v1/chat/completions, GET /v1/models and GET /v1/models/ID"
# The API of before chat models: one prompt as text, and no turns to write it in.
_COMPLETIONS = (
    "/v1/completions is not served: this model was tuned on conversations. Send messages to "
    "POST /v1/chat/completions"
)

_CODES = {
    401: "invalid_api_key",
    404: "unknown_url",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}


def is_openai(path: str) -> bool:
    """Whether a path belongs to OpenAI's API."""
    return path.startswith(PREFIX) or path == PREFIX.rstrip("/")


def openai_error(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """The body of an error; `param` names the field at fault, `code` is fit for a program."""
    if status == 429:
        kind = "requests"
    else:
        kind = "server_error" if status >= 500 or status == 408 else "invalid_request_error"
    known = code if code is not None else _CODES.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": known}}


def no_such_route(path: str, status: int) -> dict[str, object]:
    """The body for a path or a method that is not served."""
    if path.rstrip("/") == "/v1/completions":
        return openai_error(404, _COMPLETIONS)
    said = "Unknown request URL" if status == 404 else "This method is not allowed here"
    return openai_error(status, f"{said}; this endpoint serves {SERVED}")
