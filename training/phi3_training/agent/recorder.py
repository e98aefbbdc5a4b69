"""An endpoint on this machine that records what it is asked, byte by byte, and answers by script.

Every row has a path of its own, so that both sides can be asked at once and nothing is mixed up.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Dialect = Literal["score", "openai"]
_PATHS: dict[Dialect, str] = {"score": "/score", "openai": "/v1/chat/completions"}
#: Headers in which both sides must agree; the rest are ids and what the connection needs.
COMPARED = (
    "authorization",
    "accept",
    "accept-encoding",
    "azureml-model-deployment",
    "content-type",
    "extra-parameters",
    "user-agent",
)


@dataclass(frozen=True)
class Reply:
    """One scripted answer. Without a `body` it is an answer in the shape that was asked for.

    `text`: the answer; None makes one of the question. `pieces`: how it is cut when streamed.
    `cut`: the connection breaks after that many bytes of a whole answer, or pieces of a streamed
    one. `drop`: it breaks before any answer.
    """

    status: int = 200
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    pieces: Sequence[str] | None = None
    cut: int | None = None
    drop: bool = False


@dataclass(frozen=True)
class Request:
    """What came in: the path without the row's own part, the compared headers, the body."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    def difference(self, other: Request) -> str:
        """Where the other one differs first; empty where it does not."""
        if self.path != other.path:
            return f"path {self.path} and {other.path}"
        for name in COMPARED:
            ours, theirs = self.headers.get(name), other.headers.get(name)
            if ours != theirs:
                # Never the key itself.
                shown = "" if name == "authorization" else f": {ours!r} and {theirs!r}"
                return f"header {name}{shown}"
        return first_difference(self.body.decode("latin-1"), other.body.decode("latin-1"))


def first_difference(ours: str, theirs: str) -> str:
    """The first place where two texts part, with a little before and after it."""
    if ours == theirs:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    begin = max(0, at - 30)
    return f"at {at}: {ours[begin : at + 40]!r} and {theirs[begin : at + 40]!r}"


class Recorder:
    """The running endpoint: `address` for a side and a row, `requests` afterwards."""

    def __init__(self, scripts: Mapping[str, Sequence[Reply]]) -> None:
        self._scripts = scripts
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], list[Request]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        # A handler may still wait for a client that was killed.
        self._server.daemon_threads = True
        self._server.recorder = self  # type: ignore[attr-defined]

    def address(self, side: str, row: str, dialect: Dialect) -> str:
        """The endpoint's URL for one row of one side."""
        return f"http://127.0.0.1:{self._server.server_port}/{side}/{row}{_PATHS[dialect]}"

    def requests(self, side: str, row: str) -> list[Request]:
        """What that side asked for the row, in order."""
        with self._lock:
            return list(self._seen.get((side, row), ()))

    def take(self, side: str, row: str, request: Request) -> Reply:
        """Record a request; its reply is the script's next one, and from then on the last one."""
        with self._lock:
            seen = self._seen.setdefault((side, row), [])
            seen.append(request)
            script = self._scripts.get(row) or [Reply()]
            return script[min(len(seen), len(script)) - 1]

    @contextmanager
    def running(self) -> Iterator[Recorder]:
        """Serve until the block ends."""
        # Half a second by default, which every stop would wait for.
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Small writes: without it each waits 40 ms for the last one's acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, side, row, *rest = urlsplit(self.path).path.split("/")
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = {name: headers[name] for name in COMPARED if name in headers}
        recorder: Recorder = self.server.recorder  # type: ignore[attr-defined]
        reply = recorder.take(side, row, Request("/".join(rest), asked, body))
        if reply.drop:
            self.close_connection = True
            return
        question = json.loads(body)
        if reply.status == 200 and reply.body is None and question.get("stream"):
            text = _text(reply, question)
            # Seven characters: words and characters of several bytes are cut in the middle as well.
            pieces = reply.pieces
            if pieces is None:
                pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            # As every server streams whose answer has no length yet.
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number, piece in enumerate(pieces):
                if number == reply.cut:
                    self.close_connection = True
                    return
                self._event({"index": 0, "delta": {"content": piece}, "finish_reason": None})
            self._event({"index": 0, "delta": {}, "finish_reason": "stop"})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
            return
        answer = reply.body
        if answer is None:
            text = _text(reply, question)
            shape: dict[str, Any] = {"output": text}
            if "messages" in question:
                message = {"role": "assistant", "content": text}
                shape = {"choices": [{"message": message, "finish_reason": "stop"}]}
            answer = json.dumps(shape).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer if reply.cut is None else answer[: reply.cut])
        self.close_connection = reply.cut is not None

    def _event(self, choice: Mapping[str, Any]) -> None:
        self._chunk(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _text(reply: Reply, question: Mapping[str, Any]) -> str:
    """The scripted answer, else one that shows which question it answers."""
    if reply.text is not None:
        return reply.text
    messages = question.get("messages") or question["input_data"]["input_string"]
    return f"{len(messages)} messages; the last ends with: {messages[-1]['content'][-200:]} [1]"
