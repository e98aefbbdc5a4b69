"""Requests per second: the tutorials' flow (baseline) and ours as HTTP services, side by side.

Servers: `pf flow serve` and `phi3 flow serve` with both engines, and what `phi3 flow image` writes,
started without a container (its requirements in a clean environment, its own start command). All
ask the same stub endpoint over TLS, all are asked by the same load generator, one after the other;
each figure is the best of some rounds, the one that the machine disturbed least.
Run: python benchmarks/flow_serve.py [--seconds 2] [--rounds 2] [--clients 1,8,32,128]
     [--latency 0,50] [--servers …] [--image-python new] [-o json]
The image is measured where --image-python names a Python that has its requirements, or says `new`:
then they are installed into a temporary environment, over the network.
"""

from __future__ import annotations

import argparse
import json
import os
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
from support.place import KEY, Place, machine, place

READY_SECONDS = 90
IMAGE = "ours image"
# "pf": `pf flow serve`; "phi3": `phi3 flow serve`, which runs the same engines; "workers": the
# same with a worker for each core.
SERVERS = (
    "tutorial pf flask",
    "tutorial pf fastapi",
    "ours pf flask",
    "ours pf fastapi",
    "ours phi3 flask",
    "ours phi3 fastapi",
    "ours workers fastapi",
    IMAGE,
)
BASELINES = ("tutorial pf flask", "tutorial pf fastapi")


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


def own_command(flow: Path, engine: str, port: int, workers: int) -> list[str]:
    """`phi3 flow serve` as its users type it."""
    command = [sys.executable, "-m", "phi3_training.cli", "flow", "serve", str(flow)]
    return [*command, "--port", str(port), "--engine", engine, "--workers", str(workers)]


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


def burst(
    process: psutil.Process, port: int, clients: int, seconds: float, rounds: int
) -> tuple[Load, float]:
    """The best load of some, after a short one that does not count; its CPU ms per request."""
    drive(port, clients, min(1.0, seconds / 2))
    taken = []
    for _ in range(rounds):
        before = cpu_seconds(process)
        load = drive(port, clients, seconds)
        taken.append((load, 1000 * (cpu_seconds(process) - before) / max(1, load.requests)))
    return max(taken, key=lambda each: each[0].rate)


def measure(where: Place, latency: int, args: argparse.Namespace, python: str) -> list[Served]:
    """All servers under all loads at one endpoint latency, one server after the other."""
    found: list[Served] = []
    with endpoint(latency, where.certificate) as url:
        where.connect(url)
        for server in args.servers:
            port = free_port()
            command, env, cwd = _start_of(where, server, url, port, python)
            with running(command, env, cwd, port) as process:
                for count in args.clients:
                    taken = burst(process, port, count, args.seconds, args.rounds)
                    found.append(_row(found, server, latency, count, *taken))
                    _show(found[-1])
    return found


def _start_of(
    where: Place, server: str, url: str, port: int, python: str
) -> tuple[list[str], dict[str, str], Path]:
    """Command, environment and folder that start a server of this name."""
    tutorial, ours = where.copy_flows()
    if server == IMAGE:
        return image_command(where, ours, url, port, python)
    side, program, engine = server.split()
    if program in ("phi3", "workers"):
        env = {**where.env, "PHI3_ENDPOINT": url, "PHI3_KEY": KEY}
        workers = os.cpu_count() or 1 if program == "workers" else 1
        return own_command(ours, engine, port, workers), env, where.folder
    flow = tutorial if side == "tutorial" else ours
    return serve_command(flow, engine, port), where.env, where.folder


def _row(
    before: list[Served], server: str, latency: int, clients: int, load: Load, cpu: float
) -> Served:
    """With its ratios to the tutorials' flow: same engine; the image's to the faster engine."""
    engine = server.rpartition(" ")[2]
    baselines = [name for name in BASELINES if name.endswith(engine)] or BASELINES
    rows = [row for row in before if row.server in baselines and row.clients == clients]
    best = max(rows, key=lambda row: row.rate, default=None)
    compared = best is not None and server not in BASELINES
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
        f"{row.server:20}{row.clients:>8}{row.rate:>9.0f}{rate:>8}{row.cpu:>9.1f}{cpu:>8}"
        f"{row.p50:>9.1f}{row.p95:>9.1f}{row.failures:>8}",
        flush=True,
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    unknown = sorted(set(names) - set(SERVERS))
    if unknown:
        raise argparse.ArgumentTypeError(f"no server {', '.join(unknown)}")
    return names


def _wanted(named: list[str] | None, image_python: str | None) -> list[str]:
    """The servers to measure: the image's only with a Python for it."""
    if image_python:
        return named or list(SERVERS)
    if named and IMAGE in named:
        raise SystemExit(f'"{IMAGE}" needs --image-python (see --help)')
    if not named:
        print(f'Without "{IMAGE}": it needs --image-python, or --image-python new (network)')
    return named or [server for server in SERVERS if server != IMAGE]


def main() -> None:
    """Compare, print a table per latency; with `-o json` also one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="of each round (default 2)")
    parser.add_argument("--rounds", type=int, default=2, help="the best counts (default 2)")
    parser.add_argument("--clients", type=_numbers, default=[1, 8, 32, 128])
    parser.add_argument("--latency", type=_numbers, default=[0, 50], help="ms of the endpoint")
    parser.add_argument("--servers", type=_names, help=f"default: all of {', '.join(SERVERS)}")
    parser.add_argument(
        "--image-python", help="a Python that has the image's requirements, or: new (network)"
    )
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    args = parser.parse_args()
    args.servers = _wanted(args.servers, args.image_python)
    print(machine())
    found: list[Served] = []
    with place() as where:
        python = ""
        if IMAGE in args.servers:
            python = image_python(where, where.copy_flows()[1], args.image_python)
        for latency in args.latency:
            print(f"\nTLS endpoint of {latency} ms")
            print(
                f"{'':20}{'clients':>8}{'req/s':>9}{'ratio':>8}{'CPU ms':>9}{'saved':>8}"
                f"{'p50 ms':>9}{'p95 ms':>9}{'failed':>8}"
            )
            found += measure(where, latency, args, python)
    if args.output == "json":
        print(json.dumps([asdict(row) for row in found]))


if __name__ == "__main__":
    main()
