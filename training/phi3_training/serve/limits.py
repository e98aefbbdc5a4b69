"""Limits of the front door: how many requests at once, how many bytes in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from .asgi import Message, Receive

# A client that is still sending cannot read our refusal; take in this much more, this long.
_DRAIN_BYTES = 16 * 2**20
_DRAIN_SECONDS = 2.0


class TooManyPendingError(Exception):
    """More requests are pending than the endpoint takes."""


class BodyTooLargeError(Exception):
    """The request's body is over the limit."""


class ClientGoneError(Exception):
    """The client went away before its request was complete."""


class Pending:
    """Counts the requests in the house; Azure ML takes twice the concurrency, then says 429."""

    def __init__(self, concurrency: int) -> None:
        self._most = 2 * concurrency
        self.count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place; raises TooManyPendingError when there is none."""
        if self.count >= self._most:
            raise TooManyPendingError
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


async def read_body(receive: Receive, declared: str | None, limit: int) -> bytes:
    """The whole body, refused while reading as soon as it is over `limit` bytes."""
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise BodyTooLargeError
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLargeError
        more = message.get("more_body", False)
    return b"".join(parts)


async def drain(receive: Receive) -> None:
    """Take in the rest of a refused request, within limits, so that its sender can listen."""
    left = _DRAIN_BYTES
    with anyio.move_on_after(_DRAIN_SECONDS):
        more = True
        while more and left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)


def replay(body: bytes) -> Receive:
    """A `receive` that gives a body already read, then waits: its caller watches the client."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not waiting:
            await anyio.sleep_forever()
        return waiting.pop()

    return receive
