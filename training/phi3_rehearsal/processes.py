"""Processes of this machine, and the small files through which they speak with each other.

A process is known by its id *and* its start time: ids are used again, and after a restart of the
machine the same number may belong to a stranger's program.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

# The system rounds start times; two processes with one id lie further apart than this.
_SAME_SECONDS = 1.0


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

    def stop(self, timeout: float) -> bool:
        """SIGTERM, after `timeout` seconds SIGKILL. False: it did not run."""
        process = self.find()
        if process is None:
            return False
        try:
            process.terminate()
            try:
                process.wait(timeout)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(timeout)
        except psutil.NoSuchProcess:
            pass
        return True


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


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` in one step: whoever reads sees the old file or the new one, never half."""
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
