"""A threaded loopback HTTP server that answers as a test tells it to, well or badly.

It notes every request; nothing is written to disk. The few helpers at the end serve its tests.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from phi3_tool import Phi3Client, Phi3Error

KEY = "planted-key-5f1e9c"
QUESTION = [{"role": "user", "content": "Who founded Microsoft?"}]
OPENAI = "/v1/chat/completions"
SSE = {"Content-Type": "text/event-stream"}


@dataclass(frozen=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What to answer, and how unkindly."""

    status: int = 200
    body: bytes = b'{"output": "ok"}'
    headers: dict[str, str] = field(default_factory=dict)
    #: Seconds before the status line.
    delay: float = 0.0
    #: Send the body one byte at a time, with this many seconds between.
    drip: float = 0.0
    #: Promise this many bytes more than are sent, then close the connection.
    missing: int = 0
    #: Send these (seconds to wait, bytes) in HTTP chunks in place of the body …
    chunks: tuple[tuple[float, bytes], ...] | None = None
    #: … and close the connection without the last, empty chunk.
    broken_chunks: bool = False
    #: Take over the socket altogether.
    raw: Callable[[socket.socket, threading.Event], None] | None = None


Script = Callable[[Seen], Reply]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of these tests."""


class StubEndpoint:
    """`with StubEndpoint(Reply(429), Reply()) as stub`: replies in turn, the last one for good."""

    def __init__(
        self, *replies: Reply, script: Script | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._replies = list(replies) or [Reply()]
        self._script = script
        self._lock = threading.Lock()
        self.seen: list[Seen] = []
        self.connections = 0
        self.stopping = threading.Event()
        self.hung_up = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._scheme = "https" if tls else "http"
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str = "/score") -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}{path}"

    def __enter__(self) -> StubEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def next_reply(self, seen: Seen) -> Reply:
        with self._lock:
            self.seen.append(seen)
            if self._script is None:
                return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        return self._script(seen)

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805  # `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Without it the pieces of a small answer wait for each other.
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                with stub._lock:
                    stub.connections += 1

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base's name
                """Tests read `seen`, not a log."""

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                reply = stub.next_reply(Seen(self.path, headers, body))
                try:
                    self._answer(reply)
                except OSError:
                    stub.hung_up.set()
                    self.close_connection = True

            def do_CONNECT(self) -> None:
                self.do_POST()

            def do_GET(self) -> None:
                self.do_POST()

            def _answer(self, reply: Reply) -> None:
                if reply.raw is not None:
                    reply.raw(self.connection, stub.stopping)
                    self.close_connection = True
                    return
                stub.stopping.wait(reply.delay)
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.chunks is not None:
                    self._send_chunks(reply)
                    return
                if reply.status != 204:
                    self.send_header("Content-Length", str(len(reply.body) + reply.missing))
                self.end_headers()
                self._send_body(reply)

            def _send_body(self, reply: Reply) -> None:
                step = 1 if reply.drip else max(1, len(reply.body))
                for start in range(0, len(reply.body), step):
                    if start and stub.stopping.wait(reply.drip):
                        break
                    self.wfile.write(reply.body[start : start + step])
                self.close_connection = self.close_connection or bool(reply.missing)

            def _send_chunks(self, reply: Reply) -> None:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for seconds, piece in reply.chunks or ():
                    if stub.stopping.wait(seconds):
                        break
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if reply.broken_chunks:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")

        return Handler


def chunk(text: str) -> bytes:
    return f'data: {{"choices": [{{"delta": {{"content": "{text}"}}}}]}}\n\n'.encode()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block takes no longer than this."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


@contextmanager
def no_listener() -> Iterator[str]:
    """The URL of a port that is taken, so that nobody else listens, and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/score"


def failure(client: Phi3Client, **parameters: object) -> Phi3Error:
    with pytest.raises(Phi3Error) as caught:
        client.chat(QUESTION, **parameters)
    return caught.value
