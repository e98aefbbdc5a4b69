"""Makes an endpoint of the tests misbehave on purpose: wrappers of an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
from starlette.types import ASGIApp as App
from starlette.types import Receive, Scope, Send

from phi3_training.serve.frontdoor import respond

Wrapper = Callable[[App], App]


def delayed(seconds: float, times: int | None = None) -> Wrapper:
    """POST requests wait before they are answered; `times`: only the first ones."""

    async def wait(_send: Send) -> bool:
        await anyio.sleep(seconds)
        return False

    return _with(wait, times)


def refused(status: int, headers: list[tuple[str, str]], times: int) -> Wrapper:
    """The first POST requests get this status and no body."""

    async def refuse(send: Send) -> bool:
        await respond(send, status, b"", "text/plain", headers=headers)
        return True

    return _with(refuse, times)


def cut() -> Wrapper:
    """Answers promise more bytes than are sent: the server closes the connection in mid-body."""

    async def begin(send: Send) -> bool:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        part = b'{"output": "a forced'
        await send({"type": "http.response.body", "body": part, "more_body": True})
        return True

    return _with(begin, None)


def _with(act: Callable[[Send], Awaitable[bool]], times: int | None) -> Wrapper:
    """`act` first; where it returns True, it has answered."""

    def wrap(app: App) -> App:
        left = times

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal left
            if scope["type"] == "http" and scope["method"] == "POST" and left != 0:
                left = None if left is None else left - 1
                if await act(send):
                    return
            await app(scope, receive, send)

        return wrapped

    return wrap
