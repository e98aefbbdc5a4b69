"""Processes of this machine: how they are known, started and stopped, the model servers among them.

A process is known by its id *and* its start time: ids are used again, and after a restart of the
machine the same number may belong to a stranger's program.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import psutil

from .wire import Json

# The system rounds start times; two processes with one id are further apart than this.
_SAME_SECONDS = 1.0


class RehearsalError(Exception):
    """The rehearsal could not do what was asked; `python -m phi3_rehearsal` then exits 1."""


class UsageError(RehearsalError):
    """What was asked cannot be read, or nothing runs that could do it; it exits 2."""


@dataclass(frozen=True)
class ProcessId:
    """One process. As JSON: `dataclasses.asdict`."""

    pid: int
    create_time: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The process that has this id now."""
        return cls(pid, psutil.Process(pid).create_time())

    def find(self) -> psutil.Process | None:
        """The process while it lives; None for a zombie and for a stranger with the same id."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.create_time) < _SAME_SECONDS
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


def spawn(
    *words: str, log: Path, cwd: Path | None = None, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start `python -m WORDS…`, which outlives the process that starts it and writes to `log`."""
    log.touch(mode=0o600)
    with log.open("ab") as stream:
        return subprocess.Popen(  # noqa: S603 - programs of this machine, no shell
            [sys.executable, "-m", *words],
            stdin=stdin,
            stdout=stream,
            stderr=stream,
            cwd=cwd,
            env=child_environment(),
            start_new_session=True,
        )


def child_environment() -> dict[str, str]:
    """Our variables without those of a caller of Azure: jobs and servers get their own."""
    dropped = ("AZURE_", "PHI3_", "ARM_", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith(dropped)}
    # Children find this package also where it runs uninstalled, whatever folder they start in.
    package_home = str(Path(__file__).resolve().parents[1])
    paths = [package_home, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    absolute = dict.fromkeys(str(Path(path).resolve()) for path in paths)
    programs = str(Path(sys.executable).parent)
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join(absolute),
        "PATH": os.pathsep.join([programs, environment.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
    }


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` atomically: a reader sees the old file or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:  # also on Ctrl-C: leave no temporary file
        Path(temporary).unlink(missing_ok=True)
        raise


# --- model servers: each deployment has `python -m phi3_training.serve` in its own process ---
# The rehearsal knows of that program what Azure knows of an image: settings go in as a JSON file
# and the key through a pipe, the port comes out in a status file, `GET /` says that it is ready.

_SERVER_MODULE = "phi3_training.serve"
# Loading a model of several GB on a busy machine takes minutes.
_START_SECONDS, _POLL_SECONDS, _PROBE_SECONDS = 300.0, 0.05, 2.0
_STOP_SECONDS = 40.0  # it finishes the answers that it has begun, which takes 30 seconds at most

# Children are remembered so that their end can be collected; otherwise they stay as zombies.
_servers: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Server:
    """A server that answers on a loopback port."""

    process: ProcessId
    port: int


def start_server(settings: Json, *, key: str, log_path: Path) -> Server:
    """Start a server and wait until it answers. Raises RehearsalError with its log's last line."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    status_file = log_path.with_suffix(".status.json")
    status_file.unlink(missing_ok=True)
    file = log_path.with_suffix(".settings.json")
    write_atomically(file, json.dumps({**settings, "status_file": str(status_file)}))
    words = (_SERVER_MODULE, "--config", str(file), "--key-stdin")
    process = spawn(*words, log=log_path, cwd=log_path.parent, stdin=subprocess.PIPE)
    _servers[process.pid] = process
    try:
        assert process.stdin is not None  # noqa: S101 - for mypy: stdin is a pipe
        with contextlib.suppress(OSError):  # it ended at once; its log says why
            process.stdin.write(f"{key}\n\n".encode())  # a second line: the key of an upstream
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
            lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
            why = f"Its log ends with: {lines[-1]}" if lines else "Its log is empty."
            raise RehearsalError(f"The container did not start. {why}")
        if status_file.exists():
            port = int(json.loads(status_file.read_text(encoding="utf-8"))["port"])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_SECONDS)
            with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    return port
        time.sleep(_POLL_SECONDS)
    raise RehearsalError(f"The container did not answer in {_START_SECONDS:.0f} seconds.")


def server_process(deployment: Json) -> ProcessId | None:
    """The process of a deployment's server, if it has one."""
    server = deployment.get("_server")
    return ProcessId(server["pid"], server["create_time"]) if server else None


def stop_server_of(deployment: Json) -> None:
    """Stop the server of a deployment, if it has one."""
    process = server_process(deployment)
    if process is not None:
        stop_server(process)
    deployment.pop("_server", None)


def stop_server(server: ProcessId) -> None:
    """Stop a server, by force if it does not end, and collect its end."""
    process = server.find()
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(_STOP_SECONDS)
    child = _servers.pop(server.pid, None)
    if child is not None:
        child.poll()
