"""A line of a plan: what `phi3 plan` shows and what `phi3 up` refuses. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PlanLine:
    """One thing that `up` would do, or that would stop it; `details` are for `-o json`."""

    stage: str
    text: str
    stops: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
