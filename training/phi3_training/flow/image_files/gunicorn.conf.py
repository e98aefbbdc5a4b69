"""How gunicorn serves the flow: a worker per core, threads for the requests that wait.

Read by `gunicorn app:app` in this folder. PORT, PROMPTFLOW_WORKER_NUM and
PROMPTFLOW_WORKER_THREADS change what they name.
"""

import gc
import os
import sys
from pathlib import Path


def cores() -> int:
    """Cores that this container may use: its CPU limit, else those of the machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(here or 1, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no limit ("max"), or another kind of machine
        return here or 1


def settings_or_exit() -> None:
    """Refuse to start without a usable endpoint and key, in one line and without a traceback."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "flow"))
    from phi3_tool.connection import ConnectionSettings
    from phi3_tool.errors import Phi3Error

    try:
        ConnectionSettings.from_environment()
    except Phi3Error as error:
        sys.exit(f"{error}\nGive both to the container: docker run -e PHI3_ENDPOINT -e PHI3_KEY …")


bind = f"0.0.0.0:{os.environ.get('PORT', '8080')}"
workers = int(os.environ.get("PROMPTFLOW_WORKER_NUM") or cores())
worker_class = "gthread"
threads = int(os.environ.get("PROMPTFLOW_WORKER_THREADS") or 32)
# Loaded once and shared: workers start at once and cost little memory.
preload_app = True
# The client's own deadline is 240 s: it ends a request before gunicorn ends the worker.
timeout = 300
graceful_timeout = 30
keepalive = 75
backlog = 2048
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - memory, not a file
loglevel = "warning"
control_socket_disable = True


def when_ready(server):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """What was loaded so far stays: do not look for garbage in it again and again."""
    gc.collect()
    gc.freeze()


settings_or_exit()
