"""The few ASGI helpers of the front door."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[str, str]


def header(scope: Scope, name: str) -> str | None:
    """A request header's value, or None."""
    wanted = name.encode()
    values = (value.decode("latin-1") for key, value in scope["headers"] if key == wanted)
    return next(values, None)


def encoded(headers: Sequence[Header]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI has them."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


async def respond(
    send: Send,
    status: int,
    body: bytes,
    content_type: str,
    *,
    headers: Sequence[Header] = (),
) -> None:
    """Send a whole response."""
    all_headers = [("content-type", content_type), ("content-length", str(len(body))), *headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded(all_headers)})
    await send({"type": "http.response.body", "body": body})
