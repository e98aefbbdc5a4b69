"""Starts the endpoint as a process that outlives its parent, and stops exactly that process.

Writes the settings and status files next to the log (mode 0600). The key travels through a pipe.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .. import processes
from ..errors import StageError
from ..run import write_atomically
from .config import ServerConfig

_MODULE = "phi3_training.serve"
_POLL_SECONDS = 0.05
_PROBE_SECONDS = 2.0
_SHOWN_LINES = 12

# Children of this process: kept so that their end can be collected.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Started:
    """A running endpoint; pid and create_time together name the process."""

    pid: int
    create_time: float
    port: int
    endpoint: str


def start(
    config: ServerConfig,
    *,
    key: str,
    log_path: Path,
    upstream_key: str | None = None,
    wait_seconds: float = 300.0,
) -> Started:
    """Start a server and wait until it answers.

    Raises StageError with the log's last lines when it ends or does not answer in time.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    status_file = log_path.with_suffix(".status.json").absolute()
    status_file.unlink(missing_ok=True)  # an earlier server's: it would be taken for the new one's
    settings = log_path.with_suffix(".settings.json").absolute()
    # Absolute: the server runs in the log's folder.
    folders = {"model_dir": config.model_dir, "onnx_dir": config.onnx_dir}
    absolute = {name: path.absolute() for name, path in folders.items() if path is not None}
    own = config.model_copy(update={"status_file": status_file, **absolute})
    write_atomically(settings, own.to_json())
    process = _spawn(settings, log_path, f"{key}\n{upstream_key or ''}\n")
    try:
        status = _wait(process, status_file, config, log_path, wait_seconds)
    except BaseException:  # Ctrl-C too: an untracked server must not stay
        process.kill()
        process.wait()
        raise
    _children[process.pid] = process
    port = int(status["port"])
    endpoint = f"http://{_reachable(config.host)}:{port}/score"
    return Started(process.pid, float(status["create_time"]), port, endpoint)


def alive(pid: int, create_time: float) -> bool:
    """Whether that very server still runs."""
    return _find(pid, create_time) is not None


def stop(pid: int, create_time: float, timeout: float = 40.0) -> bool:
    """Stop that very server: SIGTERM, after `timeout` seconds SIGKILL. False: it did not run."""
    process = _find(pid, create_time)
    if process is None:
        _collect(pid)
        return False
    if not processes.end([process], timeout):
        raise StageError(f"The endpoint's process {pid} does not exit, even after SIGKILL")
    _collect(pid)
    return True


def _find(pid: int, create_time: float) -> psutil.Process | None:
    """The process, if pid, moment of creation and command line all fit."""
    process = processes.find(pid, create_time)
    try:
        # All three: the system uses pids again.
        return process if process is not None and _MODULE in process.cmdline() else None
    except psutil.Error:
        return None


def _collect(pid: int) -> None:
    child = _children.pop(pid, None)
    if child is not None:
        child.poll()


def _spawn(settings: Path, log_path: Path, keys: str) -> subprocess.Popen[bytes]:
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # The keys go through a pipe: arguments and environments are readable in /proc.
    command = [sys.executable, "-m", _MODULE, "--config", str(settings), "--key-stdin"]
    # A session of its own: closing the terminal or Ctrl-C there does not reach it.
    detached: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        flags = ("DETACHED_PROCESS", "CREATE_NEW_PROCESS_GROUP")
        detached = {"creationflags": sum(getattr(subprocess, flag) for flag in flags)}
    try:
        # Ours without the keys, finding our package also where it runs uninstalled.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PHI3_")}
        package_home = str(Path(__file__).resolve().parents[2])
        paths = [package_home, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        absolute = dict.fromkeys(str(Path(path).resolve()) for path in paths)
        environment["PYTHONPATH"] = os.pathsep.join(absolute)
        # Else the log is empty when a server dies early, and that log is the error message.
        environment["PYTHONUNBUFFERED"] = "1"
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=descriptor,
            stderr=descriptor,
            cwd=log_path.parent,
            env=environment,
            **detached,
        )
    finally:
        os.close(descriptor)
    assert process.stdin is not None  # noqa: S101 - for mypy: stdin is a pipe
    try:
        process.stdin.write(keys.encode())
        process.stdin.close()
    except OSError:  # it ended at once; `_wait` says why
        pass
    return process


def _wait(
    process: subprocess.Popen[bytes],
    status_file: Path,
    config: ServerConfig,
    log_path: Path,
    wait_seconds: float,
) -> dict[str, Any]:
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StageError(f"The endpoint did not start.{_last_lines(log_path)}")
        if status_file.exists():
            status: dict[str, Any] = json.loads(status_file.read_text(encoding="utf-8"))
            # Asked as well: a status file says that the port is bound, not that it answers.
            host, port = _reachable(config.host).strip("[]"), int(status["port"])
            connection = http.client.HTTPConnection(host, port, timeout=_PROBE_SECONDS)
            try:
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    return status
            except (OSError, http.client.HTTPException):
                pass  # not yet
            finally:
                connection.close()
        time.sleep(_POLL_SECONDS)
    raise StageError(
        f"The endpoint did not answer within {wait_seconds:.0f} seconds and was stopped."
        f"{_last_lines(log_path)}"
    )


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104 - no binding


def _last_lines(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        return f" Its log {log_path} is empty."
    shown = "\n".join(f"  {line}" for line in lines[-_SHOWN_LINES:])
    return f" The end of its log {log_path}:\n{shown}"
