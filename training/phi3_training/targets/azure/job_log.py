"""A job's log straight from the workspace's storage, for when the SDK cannot read it.

The SDK signs a log's address with a key that the service need not hand out. Writes nothing.
"""

from __future__ import annotations

import re
from typing import Any

from .clients import Clients
from .outputs import container_of

STORE = "workspaceartifactstore"
_PLACE = re.compile(r"datastores/(?P<store>[^/]+)/(?:paths/)?(?P<path>.+?)/?$")
# The first process of the first machine, as the SDK shows it; a pipeline has only the second.
_NAMES = (
    re.compile(r"/user_logs/std_log(_process_0+)?\.txt$"),
    re.compile(r"/user_logs/.*\.txt$"),
    re.compile(r"/logs/azureml/.*\.txt$"),
)


def read_lines(clients: Clients, name: str) -> list[str]:
    """The log so far, without a last line that is not whole yet. Raises what Azure's SDKs raise."""
    job = clients.ml.jobs.get(name)
    store, prefix = _place(job, name)
    container, blobs = container_of(clients, store, prefix)
    names = sorted(str(blob.name) for blob in blobs)
    for wanted in _NAMES:
        for found in names:
            if wanted.search(found):
                content: bytes = container.download_blob(found).readall()
                text = content.decode("utf-8", "replace")
                return text[: text.rfind("\n") + 1].splitlines()
    return []


def _place(job: Any, name: str) -> tuple[str, str]:
    """Datastore and folder of the job's own files."""
    default = (getattr(job, "outputs", None) or {}).get("default")
    match = _PLACE.search(str(getattr(default, "path", None) or ""))
    if match is not None and "${{" not in match["path"]:
        return match["store"], match["path"]
    return STORE, f"ExperimentRun/dcid.{name}"
