"""What a place to run on must offer. Two exist: this machine (`local`) and Azure ML (`azure`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from phi3_tool import Phi3Client

from ..console import ProgressCallback
from ..planning import PlanLine as PlanLine
from ..recipe import Recipe
from ..run import Run

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Access:
    """How to reach an endpoint: a key, or where a fresh Entra token comes from. Never written."""

    endpoint: str
    key: str | None = field(default=None, repr=False)
    token_provider: Callable[[], str] | None = field(default=None, repr=False)

    def client(self, **options: Any) -> Phi3Client:
        """A client; `options` are those of Phi3Client."""
        return Phi3Client(self.endpoint, self.key, token_provider=self.token_provider, **options)


class Target(Protocol):
    """Where the journey runs. Methods return manifests (no secrets); failures are StageErrors."""

    name: str

    def begin(self, recipe: Recipe, run: Run) -> None:
        """Write down where this run is, before anything is made there."""
        ...

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


class CloudTarget(Target, Protocol):
    """A target away from this machine: what it creates bills and is queried over the network."""

    def provide(
        self, recipe: Recipe, run: Run, progress: ProgressCallback, *, trains: bool
    ) -> Manifest:
        """See that all that the journey needs is there; the manifest `azure`.

        `trains`: whether what trains is needed as well.
        """
        ...

    def is_provided(self, recipe: Recipe, run: Run, *, trains: bool) -> bool:
        """Whether that is still there."""
        ...

    def prepare_base(self, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
        """Say which model is tuned; the manifest `base`."""
        ...

    def evaluate(self, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
        """Measure both models there and bring the rows back; the manifest `metrics`."""
        ...

    def place_inputs(self, recipe: Recipe, stage: str) -> Any:
        """What the result of a stage depends on at this target, in addition to the shared "
        "sections."""
        ...

    def is_up(self, run: Run) -> bool:
        """Whether the run's deployment is well and has the endpoint's traffic."""
        ...

    def is_connected(self, run: Run) -> bool:
        """Whether the run's connections still point to its endpoint; another run may have them."""
        ...

    def connect(self, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
        """Write the Prompt flow connections, here and there; the manifest `connection`."""
        ...

    def connections(self, run: Run) -> dict[str, Any]:
        """Prompt flow's connection objects by the place they were read from, secrets included."""
        ...

    def access(self, run: Run) -> Access:
        """How to reach the run's endpoint now."""
        ...

    def all_of(self, run: Run) -> list[str]:
        """What `remove` with "all" would delete."""
        ...

    def remove(self, run: Run, only: str, progress: ProgressCallback) -> list[str]:
        """Delete what bills and wait for it; the receipt, a line for each thing.

        `only`: "run" (endpoint and cluster), "failed", "idle" or "all".
        """
        ...
