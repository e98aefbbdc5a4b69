"""Ends a training process whose starter is gone: after `kill -9` nobody else tells it.

Reads the table of processes; writes nothing.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

GONE = 3  # exit status of a process that ended for this reason
_EVERY = 0.5  # seconds


def birth(pid: int) -> float:
    """When a process began: with its number, what tells it from a later one of that number."""
    return float(psutil.Process(pid).create_time())


def end_with(pid: int, born: float) -> None:
    """End this process as soon as `pid` (the `phi3` that began all) or its own parent is gone.

    Two of them would write one run otherwise: the next `phi3 train` finds the run's lock free.
    """
    parent = os.getppid()

    def check() -> None:
        if not _lives(pid, born) or os.getppid() != parent:
            os._exit(GONE)  # at once: threads of torch may wait for processes that ended as well

    def watch() -> None:
        while True:
            check()
            time.sleep(_EVERY)

    check()
    threading.Thread(target=watch, name="phi3-orphan", daemon=True).start()


def _lives(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        # A killed process that nobody has waited for yet is still listed.
        return bool(process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
