"""Ends what runs on this machine in the name of a resource that is being deleted."""

from __future__ import annotations

from .cloud import Cloud
from .servers import stop_server
from .wire import AzureError


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


ACTIVE = ("NotStarted", "Queued", "Preparing", "Starting", "Provisioning", "Running", "Finalizing")
