"""An endpoint whose streamed answer waits, after its first piece, until a test has seen that piece.

So no test needs a clock to tell a streamed answer from one that came whole. Writes nothing.
"""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import dataclass, field

from tests.integration.stub_endpoint import SSE, Reply, Seen, chunk

STOP = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
FAILED = b'data: {"error": {"message": "the GPU is out of memory", "code": 500}}\n\n'
#: Pieces of every streamed answer.
PIECES = ("Paul ", "Allen ", "founded ", "it.")
WHOLE = "Bill Gates founded it."
GATE_SECONDS = 60.0


@dataclass
class Answering:
    """The script of a stub: what is asked decides how well it answers."""

    #: Set by a test when it has seen the first piece.
    seen_first: threading.Event = field(default_factory=threading.Event)
    #: The answers that ended without that, because the time ran out.
    given_up: int = 0

    def __call__(self, seen: Seen) -> Reply:
        body = json.loads(seen.body)
        messages = body.get("messages") or body["input_data"]["input_string"]
        question = messages[-1]["content"]
        if "key" in question:
            return Reply(401, b'{"message": "no such key"}')
        if not body.get("stream"):
            openai = {"choices": [{"message": {"content": WHOLE}, "finish_reason": "stop"}]}
            score = {"output": WHOLE}
            return Reply(body=json.dumps(score if seen.path == "/score" else openai).encode())
        if "at once" in question:
            return Reply(headers=SSE, chunks=((0, FAILED),))
        if "in the middle" in question:
            return Reply(headers=SSE, chunks=((0, chunk(PIECES[0])), (0, FAILED)))
        return Reply(raw=self._piece_by_piece)

    def _piece_by_piece(self, sock: socket.socket, _: threading.Event) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        sock.sendall(head.encode() + chunk(PIECES[0]))
        if not self.seen_first.wait(GATE_SECONDS):
            self.given_up += 1
        self.seen_first.clear()
        sock.sendall(b"".join(map(chunk, PIECES[1:])) + STOP)
