"""Imitates the front door of an Azure ML online endpoint, as plain ASGI around the application.

Below `/v1/` statuses and errors are OpenAI's: no 424 wrapper there.

Reads and answers headers: ids, key, deployment, model time, the 424 wrapper. Logs one line per
request: never a body, a header's value other than a checked id, or a path that it does not know.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServerConfig
from .openai_errors import is_openai, openai_error

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


class BearerKey:
    """Says whether an Authorization header carries the key; it is in memory only."""

    def __init__(self, key: str) -> None:
        # Digests have one length, so that not even the key's length shows in the time taken.
        self._digest = hashlib.sha256(key.encode()).digest()

    def matches(self, authorization: str | None) -> bool:
        """True for `Bearer <key>`."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        # Both compared whatever the first says: the time taken tells nothing about the key.
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"


# A client that is still sending cannot read our refusal; take in this much more, this long.
_DRAIN_BYTES = 16 * 2**20
_DRAIN_SECONDS = 2.0


class TooManyPendingError(Exception):
    """More requests are pending than the endpoint accepts."""


class BodyTooLargeError(Exception):
    """The request's body is over the limit."""


class ClientGoneError(Exception):
    """The client went away before its request was complete."""


class Pending:
    """Counts the pending requests; Azure ML accepts twice the concurrency, then returns 429."""

    def __init__(self, concurrency: int) -> None:
        self._most = 2 * concurrency
        self.count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Reserve a slot; raises TooManyPendingError if there is none."""
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


logger = logging.getLogger(__name__)

_ID = re.compile(r"[ -~]+")
_MOST_ID = 100  # characters: ids are written into the log
_PATHS = frozenset(
    {
        *("/", "/score", "/swagger.json", "/chat/completions"),
        *("/v1/chat/completions", "/v1/completions", "/v1/models"),
    }
)
_TEXT, _JSON = "text/plain", "application/json"
_STREAM = b"text/event-stream"
_TIMEOUT = b"upstream request timeout"
# What Azure says without words, or in its own; for OpenAI's API.
_IN_WORDS = {
    401: "The key is missing or wrong; send it as: Authorization: Bearer KEY",
    404: "There is no such deployment at this endpoint",
    429: "Too many requests are waiting; try again later, or raise "
    "serve.max_concurrent_requests_per_instance",
    500: "internal error; see the endpoint's log",
}


class FrontDoor:
    """Lets a request in, times it, and dresses the answer as Azure ML does."""

    def __init__(self, app: ASGIApp, *, key: str, config: ServerConfig) -> None:
        self._app = app
        self._key = BearerKey(key)
        self._config = config
        self._seconds = config.request_timeout_ms / 1000
        self.pending = Pending(config.max_concurrent_requests_per_instance)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        visit = _Visit(scope, send, self._config.deployment)
        try:
            refusal = self._refusal(visit) or await self._attempt(visit, receive)
            if refusal is not None:
                if refusal[0] != 408:  # a slow body: waiting for its rest would be the same again
                    await drain(receive)
                await visit.refuse(*refusal)
        except ClientGoneError:
            visit.leave()
        except Exception as error:  # noqa: BLE001 - the last place that can answer
            while inner := getattr(error, "exceptions", None):  # an exception group
                error = inner[0]
            # Where it happened, not what it says: messages can hold a caller's text.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename}:{frame.lineno}"
            logger.error("internal error: %s at %s", type(error).__name__, where)  # noqa: TRY400
            await visit.refuse(500, b'{"error":{"message":"internal error"}}', _JSON)
        finally:
            visit.log()

    async def _attempt(self, visit: _Visit, receive: Receive) -> Refusal | None:
        """Let the application answer; what the front door says where that is not possible."""
        try:
            if visit.scope["method"] == "POST":
                with self.pending.place():
                    with anyio.fail_after(self._seconds):
                        declared = header(visit.scope, "content-length")
                        limit = self._config.max_request_bytes
                        body = await read_body(receive, declared, limit)
                    await self._pass_on(visit, receive, body)
            else:
                await self._pass_on(visit, receive, b"")
        except TooManyPendingError:
            # Without a body, as Azure's gateway answers; the reason is in the header.
            return 429, b"", _TEXT, [_reason("too_many_pending_request")]
        except BodyTooLargeError:
            limit = self._config.max_request_bytes
            return 413, f"The request is over {limit} bytes.".encode(), _TEXT
        except TimeoutError:
            return 408, _TIMEOUT, _TEXT
        return None

    def _refusal(self, visit: _Visit) -> Refusal | None:
        """What the front door says before anything is read, if it does not let the request in."""
        scope = visit.scope
        if visit.bad_id:
            text = f"{visit.bad_id} must be at most {_MOST_ID} ASCII characters."
            return 431, text.encode(), _TEXT
        # The health check comes without a key: from `process.start`, or whatever watches the port.
        if scope["path"] == "/" and scope["method"] in ("GET", "HEAD"):
            return None
        if not self._key.matches(header(scope, "authorization")):
            return 401, _UNAUTHORIZED, _JSON, [("www-authenticate", "Bearer")]
        wanted = header(scope, "azureml-model-deployment")
        if wanted is not None and wanted.strip() != self._config.deployment:
            if wanted.strip() not in self._config.adapters:
                return 404, b"Specified traffic group could not be found", _TEXT
            visit.chose(wanted.strip())
        return None

    async def _pass_on(self, visit: _Visit, receive: Receive, body: bytes) -> None:
        """Run the application until it answers, the time is up, or the client leaves."""
        visit.entered = time.perf_counter()
        async with anyio.create_task_group() as group:

            async def stop_when_the_client_leaves() -> None:
                # Else an answer that nobody reads would hold a row of the batch to its end.
                while (await receive())["type"] != "http.disconnect":
                    pass
                visit.leave()
                group.cancel_scope.cancel()

            group.start_soon(stop_when_the_client_leaves)
            with anyio.move_on_after(self._seconds) as deadline:
                await self._app(visit.scope, replay(body), visit.send)
            group.cancel_scope.cancel()
        if deadline.cancelled_caught:
            await visit.time_out()


Refusal = tuple[int, bytes, str] | tuple[int, bytes, str, list[Header]]

_UNAUTHORIZED = json.dumps(
    {
        "error": {
            "code": "key_auth_access_denied",
            "status": 401,
            "message": _IN_WORDS[401],
        }
    }
).encode()


def _reason(reason: str) -> Header:
    return ("ms-azureml-model-error-reason", reason)


class _Visit:
    """One request and its answer on the way out."""

    def __init__(self, scope: Scope, send: Send, deployment: str) -> None:
        self.scope = scope
        self.started = time.perf_counter()
        self.entered: float | None = None
        self.status: int | str | None = None
        self.bad_id = ""
        self._send = send
        self._streaming = False
        self._ended = False
        client = self._id("x-ms-client-request-id")
        self._request_id = self._id("x-request-id") or str(uuid.uuid4())
        self._headers = [
            ("x-request-id", self._request_id),
            ("azureml-model-deployment", deployment),
        ]
        if client:
            self._headers.append(("x-ms-client-request-id", client))

    def chose(self, deployment: str) -> None:
        """Answer as another deployment of this endpoint than the usual one."""
        self._headers[1] = ("azureml-model-deployment", deployment)

    def _id(self, name: str) -> str | None:
        value = header(self.scope, name)
        if value and (len(value) > _MOST_ID or not _ID.fullmatch(value)):
            self.bad_id = name
            return None
        return value or None

    async def send(self, message: Message) -> None:
        """The application's `send`: adds headers, and wraps a status other than 200 in 424."""
        if message["type"] == "http.response.start":
            inner, headers = message["status"], list(message.get("headers", ()))
            self._streaming = any(name == b"content-type" and _STREAM in v for name, v in headers)
            model_ms = 1000 * (time.perf_counter() - (self.entered or self.started))
            extra = [*self._headers, ("ms-azureml-model-time", f"{model_ms:.0f}")]
            self.status = inner
            # Whatever a container answers but 200 reaches the client as 424, with the container's
            # status and a reason in headers
            # (learn.microsoft.com/azure/machine-learning/how-to-troubleshoot-online-endpoints).
            # OpenAI's API has its own statuses.
            if inner != 200 and not is_openai(self.scope["path"]):
                self.status = 424
                extra.append(("ms-azureml-model-error-statuscode", str(inner)))
                extra.append(_reason("model_error"))
            message = {**message, "status": self.status, "headers": [*headers, *encoded(extra)]}
        else:
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def refuse(
        self, status: int, body: bytes, content_type: str, headers: list[Header] | None = None
    ) -> None:
        """Answer in the front door's own name, unless an answer has begun."""
        if self.status is not None:
            return
        self.status = status
        if is_openai(self.scope["path"]):
            message = _IN_WORDS.get(status) or body.decode()
            body, content_type = json.dumps(openai_error(status, message)).encode(), _JSON
            headers = [h for h in headers or [] if not h[0].startswith("ms-azureml-")]
        every = [*self._headers, *(headers or [])]
        await respond(self._send, status, body, content_type, headers=every)

    def leave(self) -> None:
        """Note that the client went away before its answer was complete."""
        if not self._ended:
            self.status = f"{self.status or 'no answer'}, client disconnected"

    async def time_out(self) -> None:
        """408, or, where a stream has begun, an error event at its end."""
        if self.status is None:
            await self.refuse(408, _TIMEOUT, _TEXT)
        elif not self._ended and self._streaming:
            self.status = f"{self.status}, timed out"
            said = _TIMEOUT.decode()
            azure = {"error": {"code": "timeout", "message": said}}
            event = openai_error(408, said) if is_openai(self.scope["path"]) else azure
            body = f"data: {json.dumps(event)}\n\n".encode()
            await self._send({"type": "http.response.body", "body": body})

    def log(self) -> None:
        """One line: what, how it ended, how long, which request."""
        path = self.scope["path"] if self.scope["path"] in _PATHS else "(another path)"
        logger.info(
            "%s %s %s %.0f ms id=%s",
            self.scope["method"],
            path,
            self.status,
            1000 * (time.perf_counter() - self.started),
            self._request_id,
        )
