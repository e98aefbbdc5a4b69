"""Where the journey runs: `local` (this machine) or `azure`."""

from __future__ import annotations

from ..errors import UsageError
from ..run import Run
from .base import Access, CloudTarget, PlanLine, Target

__all__ = ["PLACE", "Access", "CloudTarget", "PlanLine", "Target", "get_target", "target_of"]

PLACE = "place"  # the manifest that says where a run is; without it, on this machine


def get_target(name: str) -> Target:
    """The target called `name`; raises UsageError for one that does not exist."""
    if name == "local":
        from .local import LocalTarget

        return LocalTarget()
    if name == "azure":
        from .azure.target import AzureTarget

        return AzureTarget()
    raise UsageError(f"Unknown target {name!r}; expected local or azure")


def target_of(run: Run) -> str:
    """The name of the target that a run was made on."""
    return str((run.manifest(PLACE) or {}).get("target", "local"))
