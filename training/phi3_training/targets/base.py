"""What a place to run on must offer. Two exist: this machine (`local`) and Azure ML (`azure`)."""

from __future__ import annotations

from typing import Any, Protocol

from ..console import ProgressCallback
from ..planning import PlanLine as PlanLine
from ..recipe import Recipe
from ..run import Run

Manifest = dict[str, Any]


class Target(Protocol):
    """Where the journey runs. Methods return manifests (no secrets); failures are StageErrors."""

    name: str

    def plan(self, recipe: Recipe, run: Run) -> list[PlanLine]:
        """What this target would use and cost, and what would stop it; changes nothing."""
        ...

    def train(self, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
        """Fine-tune on the prepared chats; the manifest `model`."""
        ...

    def register(self, recipe: Recipe, run: Run) -> Manifest:
        """Put the tuned model into the target's registry; the manifest `registration`."""
        ...

    def deploy(self, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
        """Bring up an endpoint that answers; the manifest `endpoint` (url, no key)."""
        ...

    def key(self, run: Run) -> str | None:
        """The endpoint's key if this target can hand it out now; kept in memory only."""
        ...

    def status(self, run: Run) -> Manifest:
        """What of this run is up: `{"endpoint": {"state": "up"|"down"|"none", …}}`."""
        ...

    def teardown(self, run: Run) -> list[str]:
        """Stop everything that this run started; one line for each thing stopped."""
        ...
