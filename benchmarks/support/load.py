"""A load generator in a separate process: N clients ask one URL for some seconds.

Each client sends its next question when the last one is answered, over a connection that is kept
where the server keeps it. Prints one JSON line: requests, failures, seconds, latencies.
Run: python -m support.load PORT CLIENTS SECONDS
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

QUESTION = json.dumps({"input_data": "Who founded Microsoft?", "chat_history": []}).encode()
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"connection: *close|^HTTP/1\.0", re.IGNORECASE)
HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Load:
    """What one burst of load saw; times in milliseconds."""

    requests: int
    failures: int
    seconds: float
    p50: float
    p95: float

    @property
    def rate(self) -> float:
        """Answered requests per second."""
        return self.requests / self.seconds


class Client:
    """One client: asks again and again until `end`."""

    def __init__(self, port: int, end: float) -> None:
        self._port = port
        self._end = end
        self.latencies: list[float] = []
        self.failures = 0
        self._request = (
            b"POST /score HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
            b"Accept: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (port, len(QUESTION), QUESTION)
        )

    async def run(self) -> None:
        """Ask until the time is over."""
        reader = writer = None
        while time.monotonic() < self._end:
            started = time.monotonic()
            try:
                if reader is None or writer is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                ok, keeps = await asyncio.wait_for(self._ask(reader, writer), 60)
            except (OSError, EOFError, asyncio.TimeoutError, asyncio.LimitOverrunError):
                ok, keeps = False, False
            if ok:
                self.latencies.append(time.monotonic() - started)
            else:
                self.failures += 1
            if not keeps and writer is not None:
                writer.close()
                reader = writer = None
        if writer is not None:
            writer.close()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[bool, bool]:
        """Whether the answer was good, and whether the connection can be used again."""
        writer.write(self._request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        body = await reader.readexactly(int(length[1])) if length else await reader.read()
        keeps = length is not None and not _CLOSES.search(head)
        return b" 200 " in head[:15] and b"Gates" in body, keeps


def drive(port: int, clients: int, seconds: float) -> Load:
    """Load a server from another process."""
    command = [sys.executable, "-m", "support.load", str(port), str(clients), str(seconds)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    return Load(**json.loads(done.stdout))


async def _main(port: int, clients: int, seconds: float) -> None:
    started = time.monotonic()
    several = [Client(port, started + seconds) for _ in range(clients)]
    await asyncio.gather(*(client.run() for client in several))
    took = time.monotonic() - started
    seen = sorted(1000 * latency for client in several for latency in client.latencies) or [0.0]
    found = Load(
        requests=sum(len(client.latencies) for client in several),
        failures=sum(client.failures for client in several),
        seconds=took,
        p50=seen[len(seen) // 2],
        p95=seen[int(len(seen) * 0.95)],
    )
    sys.stdout.write(json.dumps(found.__dict__) + "\n")


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
