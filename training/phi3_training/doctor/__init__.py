"""What could keep the flow from answering: environment, connection, endpoint, flow, looked at.

Reads versions, Prompt flow's settings and store, the flow folder; asks the endpoint for one token.
Changes nothing and keeps nothing; the flow is checked in a temporary copy.
"""

from __future__ import annotations

from .endpoint import unfinished_rollouts
from .examine import Setup, examine
from .finding import Finding, State

__all__ = ["Finding", "Setup", "State", "examine", "unfinished_rollouts"]
