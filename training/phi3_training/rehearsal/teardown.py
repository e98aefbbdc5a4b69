"""Ends what runs on this machine in the name of a resource that is being deleted."""

from __future__ import annotations

from ..serve import process
from .cloud import Cloud
from .wire import AzureError, Json


def release(cloud: Cloud, arm_id: str) -> None:
    """Stop the servers below a resource. Raises AzureError (409) while a job runs there."""
    below = cloud.children(arm_id)
    own = cloud.get(arm_id)
    for doc in [*below, *([own] if own else [])]:
        if doc["type"].endswith("/jobs") and doc["properties"]["status"] in ACTIVE:
            raise AzureError(
                409, "Conflict", f"'{arm_id}' cannot be deleted: the job '{doc['name']}' runs."
            )
    for doc in [*below, *([own] if own else [])]:
        stop_server(doc)


def stop_server(doc: Json) -> None:
    """Stop the server of a deployment, if it has one."""
    server = doc.pop("_server", None)
    if server:
        process.stop(server["pid"], server["create_time"])


ACTIVE = ("NotStarted", "Queued", "Preparing", "Starting", "Provisioning", "Running", "Finalizing")
