"""A stub endpoint in a separate process: answers `POST /score` after a settable latency.

Keep-alive, plain or TLS; costs well under 0.1 ms of CPU per plain request, so that the other side
is what is measured. Prints its port; ends when its standard input closes.
Run: python -m support.endpoint LATENCY_MS [CERTIFICATE.pem]
"""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BODY = b'{"output": "Microsoft was founded by Bill Gates and Paul Allen in 1975."}'
REPLY = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: keep-alive\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
HERE = Path(__file__).parents[1]


class Stub(asyncio.Protocol):
    """One connection: reads whole requests, sends the one answer."""

    def __init__(self, latency: float) -> None:
        self._latency = latency
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._received, 0, end)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < whole:
                return
            self._received = self._received[whole:]
            if self._latency:
                asyncio.get_running_loop().call_later(self._latency, self._answer)
            else:
                self._answer()

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(REPLY)  # type: ignore[attr-defined]


async def _serve(latency: float, certificate: str | None) -> None:
    loop = asyncio.get_running_loop()
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    server = await loop.create_server(
        lambda: Stub(latency), "127.0.0.1", 0, ssl=context, backlog=512
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@contextmanager
def endpoint(latency_ms: float, certificate: Path | None = None) -> Iterator[str]:
    """Run a stub; yields its URL, https where a certificate is given."""
    command = [sys.executable, "-m", "support.endpoint", str(latency_ms)]
    if certificate:
        command.append(str(certificate))
    with subprocess.Popen(
        command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the stub endpoint has no pipes")
        try:
            port = process.stdout.readline().strip()
            yield f"{'https' if certificate else 'http'}://127.0.0.1:{port}/score"
        finally:
            process.stdin.close()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1]) / 1000, sys.argv[2] if len(sys.argv) > 2 else None))
