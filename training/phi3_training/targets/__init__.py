"""Where the journey runs: `local` (this machine) or `azure`."""

from __future__ import annotations

from ..errors import UsageError
from ..manifests import PlaceManifest
from ..run import Run
from .base import Access, CloudTarget, Overview, PlanLine, RunStatus, Target

__all__ = [
    "HERE",
    "Access",
    "CloudTarget",
    "Overview",
    "PlanLine",
    "RunStatus",
    "Target",
    "get_target",
    "is_here",
    "target_of",
]

HERE = "local"  # the name of this machine as a target


def get_target(name: str) -> Target:
    """The target called `name`; raises UsageError for one that does not exist."""
    if name == HERE:
        from .local import LocalTarget

        return LocalTarget()
    if name == "azure":
        from .azure.target import AzureTarget

        return AzureTarget()
    raise UsageError(f"Unknown target {name!r}; expected local or azure")


def target_of(run: Run) -> str:
    """The name of the target that a run was made on; without a place it is this machine."""
    place = run.read(PlaceManifest)
    return HERE if place is None or place.target is None else place.target


def is_here(run: Run) -> bool:
    """Whether a run was created on this machine."""
    return target_of(run) == HERE
