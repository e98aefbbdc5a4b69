"""The model servers of deployments: each is `python -m phi3_training.serve` in its own process.

The rehearsal knows of that program what Azure knows of an image: settings go in as a JSON file and
the key through a pipe, the port comes out in a status file, `GET /` says that it is ready.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RehearsalError
from .processes import ProcessId, child_environment, write_atomically
from .wire import Json

_PROGRAM = "phi3_training.serve"
_START_SECONDS, _POLL_SECONDS, _PROBE_SECONDS = 300.0, 0.05, 2.0
_STOP_SECONDS = 40.0  # it finishes the answers that it has begun, which takes 30 seconds at most

# Children are remembered so that their end can be collected; otherwise they stay as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Server:
    """A server that answers on a loopback port."""

    process: ProcessId
    port: int


def start(settings: dict[str, Any], *, key: str, log_path: Path) -> Server:
    """Start a server and wait until it answers. Raises RehearsalError with its log's last line."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    status_file = log_path.with_suffix(".status.json")
    status_file.unlink(missing_ok=True)
    file = log_path.with_suffix(".settings.json")
    write_atomically(file, json.dumps({**settings, "status_file": str(status_file)}))
    log_path.touch(mode=0o600)
    with log_path.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - a program of this machine, no shell
            [sys.executable, "-m", _PROGRAM, "--config", str(file), "--key-stdin"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=log_path.parent,
            env=child_environment(),
            start_new_session=True,  # it outlives the rehearsal's process
        )
    _children[process.pid] = process
    try:
        assert process.stdin is not None  # noqa: S101 - for mypy: stdin is a pipe
        process.stdin.write(f"{key}\n\n".encode())  # a second line is the key of an upstream
        process.stdin.close()
        port = _await_port(process, status_file, log_path)
    except BaseException:  # a server that nobody knows of must not stay
        process.kill()
        process.wait()
        raise
    return Server(ProcessId.of(process.pid), port)


def _await_port(process: subprocess.Popen[bytes], status_file: Path, log_path: Path) -> int:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RehearsalError(f"The container did not start. {_last_line(log_path)}")
        if status_file.exists():
            port = int(json.loads(status_file.read_text(encoding="utf-8"))["port"])
            if _answers(port):
                return port
        time.sleep(_POLL_SECONDS)
    raise RehearsalError(f"The container did not answer in {_START_SECONDS:.0f} seconds.")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_line(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"Its log ends with: {lines[-1]}" if lines else "Its log is empty."


def process_of(deployment: Json) -> ProcessId | None:
    """The process of a deployment's server, if it has one."""
    server = deployment.get("_server")
    return ProcessId(server["pid"], server["create_time"]) if server else None


def stop_server(deployment: Json) -> None:
    """Stop the server of a deployment, if it has one."""
    process = process_of(deployment)
    if process is not None:
        stop(process)
    deployment.pop("_server", None)


def stop(process: ProcessId) -> None:
    """Stop a server and collect its end."""
    process.stop(_STOP_SECONDS)
    child = _children.pop(process.pid, None)
    if child is not None:
        child.poll()
