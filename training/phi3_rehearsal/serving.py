"""The process of a rehearsal, `python -m phi3_rehearsal serve FOLDER PORT`. Ends on SIGTERM."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType

from . import (  # noqa: F401 - importing a service module declares its routes
    access,
    assets,
    compute,
    connections,
    control,
    deployments,
    endpoints,
    flows,
    groups,
    history,
    inference,
    jobs,
    registries,
    servers,
    shares,
    signin,
    storage,
    teardown,
    workspaces,
)
from .authority import Authority
from .cloud import Cloud
from .proxy import Proxy


def serve(folder: Path, port: int) -> int:
    """Answer until a signal comes; then end the jobs and servers that run here."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    cloud = Cloud(folder)
    proxy = Proxy(cloud, Authority(folder), port)
    with cloud.lock:
        deployments.resume(cloud)
        cloud.save()
    control.write_process(folder, proxy.port)
    ended = threading.Event()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    ended.wait()
    proxy.close()
    with cloud.lock:
        for job in cloud.children("/subscriptions", jobs.KIND):
            jobs.cancel(cloud, job)
        for deployment in cloud.children("/subscriptions", endpoints.DEPLOYMENT_KIND):
            servers.stop_server(deployment)
        cloud.save()
    return 0
