"""A requests session whose every read obeys one total deadline, even where a server drips bytes."""

from __future__ import annotations

import http.client
import io
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from http.cookiejar import DefaultCookiePolicy
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util.retry import Retry as UrllibRetry

from .connection import Address
from .errors import ServiceError, one_line
from .failures import retry_after_seconds, server_words

# Connections that stay open for each host: as many threads can ask at once without a new handshake.
POOL_SIZE = 64
_CHUNK = 64 * 1024


class Deadline:
    """The time one call may take in all, and the longest silence within it; in seconds."""

    def __init__(self, total: float, silence: float) -> None:
        self._silence = silence
        self._end = time.monotonic() + total

    @property
    def remaining(self) -> float:
        """Seconds left; never below zero."""
        return max(0.0, self._end - time.monotonic())

    def shorten(self, seconds: float) -> None:
        """Leave at most this much time."""
        self._end = min(self._end, time.monotonic() + seconds)

    def limit(self, seconds: float | None = None) -> float:
        """The timeout for one socket operation."""
        # Never zero: settimeout(0) makes a socket non-blocking.
        return max(0.001, min(self._silence if seconds is None else seconds, self.remaining))


# http.client makes its response object itself, so the deadline cannot be passed as an argument.
_DEADLINE: ContextVar[Deadline | None] = ContextVar("phi3_tool_deadline", default=None)


@contextmanager
def deadline_applies(deadline: Deadline) -> Iterator[None]:
    """Responses begun inside are read under this deadline, also after the block has ended."""
    token = _DEADLINE.set(deadline)
    try:
        yield
    finally:
        _DEADLINE.reset(token)


class _DeadlinePassed(socket.timeout):
    """The class that urllib3 takes for a read timeout on every Python version."""


class _TimedReader(io.RawIOBase):
    """The socket's reader with its timeout reset before each read."""

    # A socket's timeout starts again with each byte that arrives, so a server that drips bytes
    # would be waited for without end. Here each read, of headers too, gets what is left of the
    # deadline.
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: Deadline) -> None:
        super().__init__()
        self._raw = raw
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._deadline.remaining <= 0:
            raise _DeadlinePassed("the deadline has passed")
        self._sock.settimeout(self._deadline.limit())
        return cast("int | None", self._raw.readinto(buffer))  # type: ignore[attr-defined,unused-ignore]

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        deadline = _DEADLINE.get()
        if deadline is not None:
            self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock, deadline))


class _PlainConnection(HTTPConnection):
    response_class = _TimedResponse


class _TlsConnection(HTTPSConnection):
    response_class = _TimedResponse


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _TimedAdapter(HTTPAdapter):
    def __init__(self) -> None:
        # Retries are ours alone: urllib3's know nothing of the deadline.
        super().__init__(
            pool_connections=4, pool_maxsize=POOL_SIZE, max_retries=UrllibRetry(0, read=False)
        )

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}

    def proxy_manager_for(self, proxy: Any, **proxy_kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **proxy_kwargs)
        manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
        return manager


def new_session(address: Address) -> requests.Session:
    """A pooled session for one endpoint, safe to share between threads."""
    session = requests.Session()
    # Read the environment once, here: left to requests it would also look for a netrc entry,
    # and would send what is meant for this machine through a proxy.
    session.trust_env = False
    if not address.is_loopback:
        session.proxies = dict(get_environ_proxies(address.url))
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    session.verify = bundle or True
    # The jar is the one thing in a session that threads would write to.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = _TimedAdapter()
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


# Measured on loopback over TLS: 28 ms a call where each makes a session of its own, as
# requests.post does, 1.3 ms with one session.
class Poster:
    """POSTs to one endpoint over pooled connections; safe to share between threads."""

    def __init__(self, address: Address) -> None:
        self._session = new_session(address)
        # Made once: taking the URL apart again for each request costs as much as sending it.
        self._blank = self._session.prepare_request(requests.Request("POST", address.url))

    def post(
        self,
        body: bytes,
        headers: Mapping[str, str],
        auth: Callable[[requests.PreparedRequest], requests.PreparedRequest],
        timeout: tuple[float, float],
    ) -> requests.Response:
        """The response, its body not yet read; follows no redirect.

        `timeout`: seconds to connect and to wait for a byte. Raises what requests raises.
        """
        request = self._blank.copy()
        request.body = body
        request.headers.update(headers)
        request.headers["Content-Length"] = str(len(body))
        return self._session.send(
            auth(request), timeout=timeout, allow_redirects=False, stream=True
        )

    def close(self) -> None:
        """Close the connections that are idle."""
        self._session.close()


def body_pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives: a piece may be of any size, and none waits for the next."""
    raw = response.raw
    # Off by default in urllib3 1.x: a body shorter than it was promised would pass for whole.
    raw.enforce_content_length = True
    read1 = getattr(raw, "read1", None)
    if read1 is None:  # urllib3 1.x
        yield from raw.stream(_CHUNK if getattr(raw, "chunked", False) else 1, decode_content=True)
        return
    while True:
        piece: bytes = read1(_CHUNK, decode_content=True)
        if not piece:
            return
        yield piece


def read_up_to(limit: int, response: requests.Response, body: bytearray | None = None) -> bytearray:
    """The body, into `body`; one that is longer than `limit` ends as soon as it is seen to be."""
    body = bytearray() if body is None else body
    for piece in body_pieces(response):
        body += piece
        if len(body) > limit:
            break
    return body


def system_reason(error: BaseException) -> str | None:
    """The operating system's word on it, wherever in the chain it sits."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        item = waiting.pop()
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, OSError) and item.strerror:
            return str(item.strerror)
        waiting += [item.__cause__, item.__context__, getattr(item, "reason", None), *item.args]
    return None


#: The longest Retry-After that is waited for, in seconds.
LONGEST_WAIT = 60.0


def request_with_retries(
    session: requests.Session,
    method: str,
    url: str,
    what: str,
    *,
    tries: int,
    sleep: Callable[[float], None] = time.sleep,
    **request: Any,
) -> requests.Response:
    """The first answer that is neither 429 nor 5xx, to a request that may safely be repeated.

    Lost connections are retried too. Waits 1, 2, 4 … seconds, or what Retry-After says. Raises
    ServiceError, which begins with `what`, when no try is left.
    """
    reason = ""
    # Without jitter: one process fills an index or asks for vectors, there is no herd to spread.
    for attempt in range(tries):
        wait = 2.0**attempt
        try:
            answer = session.request(method, url, **request)
        except requests.RequestException as error:
            reason = f"no connection ({type(error).__name__})"
        else:
            if answer.status_code != 429 and answer.status_code < 500:
                return answer
            reason = f"status {answer.status_code}: {said_by(answer)}"
            wait = retry_after_seconds(answer.headers) or wait
        if attempt < tries - 1:
            sleep(min(wait, LONGEST_WAIT))
    raise ServiceError(f"{what}: {reason}")


def said_by(answer: requests.Response) -> str:
    """A server's own message in an error answer, on one line."""
    return one_line(server_words(answer.text) or answer.text)
