"""Where the journey runs: `local` (this machine) or `azure`."""

from __future__ import annotations

from ..errors import UsageError
from .base import PlanLine, Target

__all__ = ["PlanLine", "Target", "get_target"]


def get_target(name: str) -> Target:
    """The target called `name`; raises UsageError for one that does not exist."""
    if name == "local":
        from .local import LocalTarget

        return LocalTarget()
    if name == "azure":
        raise UsageError(
            "The Azure half is not in this version yet; run on this machine with: phi3 up"
        )
    raise UsageError(f"Unknown target {name!r}; expected local or azure")
