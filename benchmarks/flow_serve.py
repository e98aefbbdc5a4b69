"""Requests per second: the tutorials' flow (baseline) and ours as HTTP services, side by side.

Servers: `pf flow serve` with both engines, and what `phi3 flow image` writes, started here without
a container (its requirements in a clean environment, its own start script). All ask the same stub
endpoint over TLS (or plain), all are asked by the same load generator; each has its own process.
Run: python benchmarks/flow_serve.py [--seconds 3] [--clients 1,8,32,128] [--latency 0,50]
     [--servers …] [--image-python FOLDER/bin/python] [-o json]
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from support.endpoint import endpoint
from support.image import image_command, image_python
from support.load import Load, drive
from support.place import Place, machine, place

READY_SECONDS = 90
SERVERS = ("tutorial flask", "tutorial fastapi", "ours flask", "ours fastapi", "ours image")
BASELINE = {"ours flask": "tutorial flask", "ours fastapi": "tutorial fastapi"}


@dataclass(frozen=True)
class Served:
    """What one server did under one load; CPU in milliseconds per request."""

    server: str
    latency: int
    clients: int
    rate: float
    ratio: float | None
    cpu_ratio: float | None
    p50: float
    p95: float
    cpu: float
    failures: int


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve_command(flow: Path, engine: str, port: int) -> list[str]:
    """`pf flow serve` as its users type it."""
    command = [str(Path(sys.executable).with_name("pf")), "flow", "serve", "--source", str(flow)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--engine", engine]
    return [*command, "--skip-open-browser"]


@contextmanager
def running(
    command: list[str], env: dict[str, str], cwd: Path, port: int
) -> Iterator[psutil.Process]:
    """A server that answers its health check; it and its children are stopped at the end."""
    log = cwd / "server.log"
    with log.open("wb") as stream:
        process = psutil.Popen(
            command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
    try:
        _wait_until_healthy(process, port, log)
        yield process
    finally:
        family = [process, *_children(process)]
        process.send_signal(signal.SIGINT)
        for left in psutil.wait_procs(family, timeout=10)[1]:
            left.kill()
        psutil.wait_procs(family, timeout=5)


def _wait_until_healthy(process: psutil.Process, port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            break
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a server and its workers so far."""
    times = [each.cpu_times() for each in (process, *_children(process))]
    return float(sum(each.user + each.system for each in times))


def burst(process: psutil.Process, port: int, clients: int, seconds: float) -> tuple[Load, float]:
    """One load, after a short one that does not count; the CPU milliseconds per request."""
    drive(port, clients, min(1.0, seconds / 2))
    before = cpu_seconds(process)
    load = drive(port, clients, seconds)
    return load, 1000 * (cpu_seconds(process) - before) / max(1, load.requests)


def measure(
    where: Place, servers: list[str], latency: int, clients: list[int], seconds: float, python: str
) -> list[Served]:
    """All servers under all loads at one endpoint latency, one server after the other."""
    tutorial, ours = where.copy_flows()
    found: list[Served] = []
    with endpoint(latency, where.certificate) as url:
        where.connect(url)
        for server in servers:
            side, kind = server.split()
            port = free_port()
            env, cwd = where.env, where.folder
            if kind == "image":
                command, env, cwd = image_command(where, ours, url, port, python)
            else:
                command = serve_command(tutorial if side == "tutorial" else ours, kind, port)
            with running(command, env, cwd, port) as process:
                for count in clients:
                    found.append(
                        _row(found, server, latency, count, *burst(process, port, count, seconds))
                    )
                    _show(found[-1])
    return found


def _row(
    before: list[Served], server: str, latency: int, clients: int, load: Load, cpu: float
) -> Served:
    """With its ratios to the tutorials' flow: same engine; the image's to the faster engine."""
    baselines = [BASELINE[server]] if server in BASELINE else list(BASELINE.values())
    rows = [row for row in before if row.server in baselines and row.clients == clients]
    best = max(rows, key=lambda row: row.rate, default=None)
    compared = best is not None and server not in BASELINE.values()
    return Served(
        server=server,
        latency=latency,
        clients=clients,
        rate=load.rate,
        ratio=load.rate / best.rate if best and compared else None,
        cpu_ratio=best.cpu / cpu if best and compared else None,
        p50=load.p50,
        p95=load.p95,
        cpu=cpu,
        failures=load.failures,
    )


def _show(row: Served) -> None:
    rate, cpu = (f"{ratio:.1f}x" if ratio else "-" for ratio in (row.ratio, row.cpu_ratio))
    print(
        f"{row.server:18}{row.clients:>8}{row.rate:>9.0f}{rate:>8}{row.cpu:>9.1f}{cpu:>8}"
        f"{row.p50:>9.1f}{row.p95:>9.1f}{row.failures:>8}",
        flush=True,
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Compare, print a table per latency; with `-o json` also one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="for each figure (default 3)")
    parser.add_argument("--clients", type=_numbers, default=[1, 8, 32, 128])
    parser.add_argument("--latency", type=_numbers, default=[0, 50], help="ms of the endpoint")
    parser.add_argument("--servers", default=",".join(SERVERS), help=f"of: {', '.join(SERVERS)}")
    parser.add_argument("--image-python", help="a Python that has the image's requirements")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    servers = [name.strip() for name in args.servers.split(",")]
    unknown = set(servers) - set(SERVERS)
    if unknown:
        parser.error(f"no server {', '.join(sorted(unknown))}; known: {', '.join(SERVERS)}")
    print(machine())
    found: list[Served] = []
    with place() as where:
        python = ""
        if "ours image" in servers:
            python = image_python(where, where.copy_flows()[1], args.image_python)
        for latency in args.latency:
            print(f"\nTLS endpoint of {latency} ms")
            print(
                f"{'':18}{'clients':>8}{'req/s':>9}{'ratio':>8}{'CPU ms':>9}{'saved':>8}"
                f"{'p50 ms':>9}{'p95 ms':>9}{'failed':>8}"
            )
            found += measure(where, servers, latency, args.clients, args.seconds, python)
    if args.output == "json":
        print(json.dumps([asdict(row) for row in found]))


if __name__ == "__main__":
    main()
