"""Processes and ports of this machine: identifies processes, ends them, finds a free port.

A system reuses pids, so the start time goes with the pid. Reads the table of processes; writes
nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil

# The system rounds the moment a process was created; two processes with one pid are further apart.
_SAME_SECONDS = 1.0


def start_time(pid: int) -> float:
    """When a process began, in seconds since 1970. Raises psutil.NoSuchProcess."""
    return float(psutil.Process(pid).create_time())


def find(pid: int, started: float) -> psutil.Process | None:
    """The process of that pid and start time while it runs."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _SAME_SECONDS
        # A killed process that was not waited for yet is still listed.
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def end(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """End these and all that they started: SIGTERM, after `seconds` SIGKILL. Whether all ended."""
    # The children are listed before anything is ended: those of a dead process belong to init,
    # and nothing leads to them any more.
    family: list[psutil.Process] = []
    for process in processes:
        try:
            family += [*process.children(recursive=True), process]
        except psutil.NoSuchProcess:
            continue
    alive = family
    for signal in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            try:
                signal(process)
            except psutil.NoSuchProcess:
                continue
        alive = psutil.wait_procs(alive, seconds)[1]
    return not alive


def free_port() -> int:
    """A free port of the loopback interface."""
    # Free until somebody else takes it: whoever binds it next must be ready to be refused.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
