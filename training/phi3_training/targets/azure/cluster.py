"""The GPU cluster: made once, kept as the recipe says, told apart from a failed one."""

from __future__ import annotations

from typing import Any

from ...console import ProgressCallback
from ...errors import StageError
from ...recipe_azure import ComputeSection
from .clients import Clients
from .sizes import find_size
from .waiting import look, make, state_of


def ensure_cluster(
    clients: Clients, section: ComputeSection, tags: dict[str, str], progress: ProgressCallback
) -> str:
    """`exists` or `created`; StageError, with what still bills, when it cannot be used."""
    operations = clients.ml.compute
    found = look(lambda: operations.get(section.name), f"Looking for the cluster {section.name}")
    # One that is being deleted refuses the call below until it is gone.
    if found is not None and state_of(found) not in ("failed", "deleting"):
        _fits(found, section)
        return "exists"
    size = find_size(clients, section.size, "azure.compute.size")
    if size.gpus < 1:
        raise StageError(f"{size.name} has no GPU. Mend: set azure.compute.size to one that has")
    try:
        made = make(
            f"Making the cluster {section.name}",
            lambda: operations.begin_create_or_update(_body(clients, section, tags)),
            lambda: operations.get(section.name),
            progress,
            limit=clients.poll.provision_timeout,
            pause=clients.poll.interval,
        )
    except StageError as error:
        raise StageError(f"{error}. {_still_there(clients, section.name)}") from None
    if state_of(made) == "failed":
        raise StageError(
            f"Azure made the cluster in the state Failed. {_still_there(clients, section.name)}"
        )
    return "created"


def _body(clients: Clients, section: ComputeSection, tags: dict[str, str]) -> Any:
    from azure.ai.ml.entities import AmlCompute

    return AmlCompute(
        name=section.name,
        size=section.size,
        tier="low_priority" if section.tier == "LowPriority" else "dedicated",
        min_instances=section.min_instances,
        max_instances=section.max_instances,
        idle_time_before_scale_down=section.idle_time_before_scale_down,
        location=clients.workplace.location,
        tags=tags,
    )


def _fits(found: Any, section: ComputeSection) -> None:
    size = str(getattr(found, "size", "") or "")
    if size and size.lower() != section.size.lower():
        raise StageError(
            f"it has machines of size {size}, the recipe says {section.size}. Mend: set "
            f"azure.compute.size={size}, or another azure.compute.name"
        )
    most = getattr(found, "max_instances", None)
    if most is not None and int(most) < section.max_instances:
        raise StageError(
            f"it has at most {most} machines, the recipe says {section.max_instances}. Mend: set "
            f"azure.compute.max_instances={most}, or another azure.compute.name"
        )


def _still_there(clients: Clients, name: str) -> str:
    place = clients.workplace
    return (
        "A failed cluster stays until it is deleted, and bills if it has nodes: "
        f"az ml compute delete --name {name} --workspace-name {place.workspace_name} "
        f"--resource-group {place.resource_group}"
    )
