"""How long a person waits for the first word: streamed against whole, through the served flow.

One endpoint that makes a token every --token-ms; each question is asked both ways, alternating, at
the endpoint itself (a bare client) and at our flow served by both engines. Prints medians and the
ratio. Run: python benchmarks/first_token.py [--tokens 64] [--token-ms 20] [--rounds 7] [-o json]
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from flow_serve import free_port, running, serve_command
from support.place import KEY, machine, place

PATH = "/v1/chat/completions"
QUESTION = "Who founded Microsoft?"
ENGINES = ("fastapi", "flask")
Ask = Callable[[bool], tuple[float, float]]


@dataclass(frozen=True)
class Wait:
    """Medians, in milliseconds. `ratio`: how many times sooner the first token is there."""

    where: str
    first_token: float
    streamed_to_its_end: float
    whole: float

    @property
    def ratio(self) -> float:
        """Whole answer over first token."""
        return self.whole / self.first_token


@contextmanager
def model(tokens: int, seconds: float) -> Iterator[str]:
    """An endpoint that takes `seconds` for each token, streamed or not; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked.get("stream"):
                self._stream()
                return
            time.sleep(tokens * seconds)
            choice = {"message": {"content": "token " * tokens}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice]}).encode()
            self._head("application/json", ("Content-Length", str(len(body))))
            self.wfile.write(body)

        def _stream(self) -> None:
            self._head("text/event-stream", ("Transfer-Encoding", "chunked"))
            for _ in range(tokens):
                time.sleep(seconds)
                self._event({"delta": {"content": "token "}})
            self._event({"delta": {}, "finish_reason": "stop"})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

        def _event(self, choice: dict[str, object]) -> None:
            self._chunk(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def _head(self, kind: str, header: tuple[str, str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header(*header)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            """Nobody reads it."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """The served flow hangs up when it is stopped."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{PATH}"
    finally:
        server.shutdown()
        server.server_close()


def at_endpoint(url: str) -> Ask:
    """Ask the endpoint itself."""
    messages = [{"role": "user", "content": QUESTION}]
    port = urlsplit(url).port or 0
    return lambda stream: timed(port, PATH, {"messages": messages, "stream": stream}, "*/*")


def at_flow(port: int) -> Ask:
    """Ask the served flow."""
    accept = {True: "text/event-stream", False: "application/json"}
    return lambda stream: timed(port, "/score", {"input_data": QUESTION}, accept[stream])


def timed(port: int, path: str, body: object, accept: str) -> tuple[float, float]:
    """Milliseconds to the first bytes of the answer's body, and to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {
        "Content-Type": "application/json",
        "Accept": accept,
        "Authorization": f"Bearer {KEY}",
    }
    began = time.perf_counter()
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    first = response.read1(1)
    first_at = time.perf_counter()
    text = first + response.read()
    ended_at = time.perf_counter()
    connection.close()
    if response.status != 200 or b"token" not in text:
        raise RuntimeError(f"status {response.status}: {text[:300]!r}")
    return 1000 * (first_at - began), 1000 * (ended_at - began)


def measure(where: str, ask: Ask, rounds: int) -> Wait:
    """Both ways, alternating."""
    ask(True)  # connections, imports
    ask(False)
    streamed, whole = [], []
    for _ in range(rounds):
        streamed.append(ask(True))
        whole.append(ask(False)[1])
    return Wait(
        where,
        statistics.median(first for first, _ in streamed),
        statistics.median(end for _, end in streamed),
        statistics.median(whole),
    )


def compare(tokens: int, token_ms: float, rounds: int) -> list[Wait]:
    """The endpoint itself, then the flow in both engines."""
    with model(tokens, token_ms / 1000) as url, place() as here:
        waits = [measure("the endpoint itself", at_endpoint(url), rounds)]
        _, flow = here.copy_flows()
        here.connect(url)
        for engine in ENGINES:
            port = free_port()
            command = serve_command(flow, engine, port)
            with running(command, here.env, here.folder, port):
                waits.append(measure(f"pf flow serve, {engine}", at_flow(port), rounds))
    return waits


def main() -> None:
    """Measure, print the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--token-ms", type=float, default=20.0, help="for each token (20)")
    parser.add_argument("--rounds", type=int, default=7, help="questions each way (7)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    about = machine()
    waits = compare(args.tokens, args.token_ms, args.rounds)
    rows = [{**asdict(wait), "ratio": wait.ratio} for wait in waits]
    if args.output == "text":
        print(f"{args.tokens} tokens, {args.token_ms:g} ms each; {about}; medians of {args.rounds}")
        print(f"{'milliseconds':24}{'first token':>13}{'stream ends':>13}{'whole':>9}{'ratio':>8}")
        for wait in waits:
            print(
                f"{wait.where:24}{wait.first_token:>13.0f}{wait.streamed_to_its_end:>13.0f}"
                f"{wait.whole:>9.0f}{wait.ratio:>8.1f}"
            )
    json.dump({"rows": rows, "tokens": args.tokens, "token_ms": args.token_ms}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
