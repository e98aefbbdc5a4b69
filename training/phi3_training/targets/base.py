"""What a place to run on must offer. Two exist: this machine (`local`) and Azure ML (`azure`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict

from phi3_tool.client import Phi3Client

from ..manifests import (
    AnswerManifest,
    BaseManifest,
    ConnectionManifest,
    EndpointManifest,
    Manifest,
    MetricsManifest,
    ModelManifest,
    ProvisionManifest,
    RegistrationManifest,
)
from ..progress import PlanLine as PlanLine
from ..progress import Progress
from ..recipe import Recipe
from ..run import Run


@dataclass(frozen=True)
class Access:
    """How to reach an endpoint: a key, or where a fresh Entra token comes from. Never written."""

    endpoint: str
    key: str | None = field(default=None, repr=False)
    token_provider: Callable[[], str] | None = field(default=None, repr=False)

    def client(self, **options: Any) -> Phi3Client:
        """A client; `options` are those of Phi3Client."""
        return Phi3Client(self.endpoint, self.key, token_provider=self.token_provider, **options)


class EndpointStatus(TypedDict, total=False):
    """The state of a run's endpoint; besides `state` what is known of it at its target."""

    state: str  # up, down or none
    url: str
    engine: str  # on this machine
    pid: int | None
    name: str  # on Azure, as the rest
    deployment: str
    reason: str  # why it is down


class RunStatus(TypedDict, total=False):
    """What of a run is up; keys of `-o json`. A cloud adds `lines` for people, and what bills."""

    endpoint: EndpointStatus
    lines: list[str]
    bills: list[str]


class Overview(TypedDict):
    """What exists and bills in one workspace, whichever runs use it; keys of `-o json`."""

    workspace: str
    resource_group: str
    subscription: str
    lines: list[str]
    bills: list[str]
    usd: dict[str, float]  # per hour, so far, until the deadlines


class Target(Protocol):
    """Where a run takes place. Results are recorded in manifests; failures are StageErrors."""

    name: str

    @property
    def cloud(self) -> CloudTarget | None:
        """The same target with what only one away from this machine can do; None: it is here."""
        ...

    def begin(self, recipe: Recipe, run: Run) -> None:
        """Write down where this run is, before anything is made there."""
        ...

    def plan(self, recipe: Recipe, run: Run) -> list[PlanLine]:
        """What this target would use and cost, and what would stop it; changes nothing."""
        ...

    def inputs(self, recipe: Recipe, stage: type[Manifest], shared: object) -> object:
        """What the result of a stage depends on: `shared`, and what counts at this target."""
        ...

    def prepare_base(self, recipe: Recipe, run: Run, progress: Progress) -> BaseManifest:
        """Make or find the model that is tuned, or say which one it is."""
        ...

    def train(self, recipe: Recipe, run: Run, progress: Progress) -> ModelManifest:
        """Fine-tune on the prepared chats."""
        ...

    def evaluate(self, recipe: Recipe, run: Run, progress: Progress) -> MetricsManifest:
        """Measure both models; the rows are in the run folder afterwards."""
        ...

    def register(self, recipe: Recipe, run: Run) -> RegistrationManifest:
        """Put the tuned model into the target's registry."""
        ...

    def deploy(self, recipe: Recipe, run: Run, progress: Progress) -> EndpointManifest:
        """Bring up an endpoint that answers (url, no key)."""
        ...

    def is_up(self, recipe: Recipe, run: Run) -> bool:
        """Whether the run's endpoint answers, and can still be connected to."""
        ...

    def connect(self, recipe: Recipe, run: Run, progress: Progress) -> ConnectionManifest:
        """Write the Prompt flow connections for the endpoint."""
        ...

    def is_connected(self, run: Run) -> bool:
        """Whether the run's connections still point to its endpoint; another run may have them."""
        ...

    def ask(self, flow: Path, recipe: Recipe, run: Run, progress: Progress) -> AnswerManifest:
        """The answer of the flow to the recipe's question, through each connection."""
        ...

    def key(self, run: Run) -> str | None:
        """The endpoint's key if this target can hand it out now; kept in memory only."""
        ...

    def status(self, run: Run) -> RunStatus:
        """What of this run is up."""
        ...

    def teardown(self, run: Run) -> list[str]:
        """Stop everything that this run started; one line for each thing stopped."""
        ...


class FoundPlace(Protocol):
    """A place in which phi3 made something, as it is found without any run folder."""

    label: str

    def names(self) -> list[str]:
        """What `delete` would delete; empty where there is nothing."""
        ...

    def delete(self, progress: Progress, *, everything: bool) -> list[str]:
        """Delete it and wait; the receipt. `everything`: also the workspace itself."""
        ...


class CloudTarget(Target, Protocol):
    """A target away from this machine: what it creates bills and is queried over the network."""

    def provide(
        self, recipe: Recipe, run: Run, progress: Progress, *, trains: bool
    ) -> ProvisionManifest:
        """See that all that the journey needs is there.

        `trains`: whether what trains is needed as well.
        """
        ...

    def train(
        self, recipe: Recipe, run: Run, progress: Progress, *, deploys: bool = False
    ) -> ModelManifest:
        """Fine-tune on the prepared chats.

        `deploys`: the model is to be deployed afterwards, so what that needs and costs nothing may
        be made meanwhile.
        """
        ...

    def is_provided(self, recipe: Recipe, run: Run, *, trains: bool) -> bool:
        """Whether that is still there."""
        ...

    def overview(
        self, runs: Sequence[Run], named: Mapping[str, str], *, search: bool
    ) -> list[Overview]:
        """What exists and bills in the runs' places, each once; with `search` also in those that
        have no run here. `named` are keys of the place that the user named."""
        ...

    def found(self, named: Mapping[str, str]) -> Sequence[FoundPlace]:
        """The places that `named` means and phi3 made something in."""
        ...

    def access(self, run: Run) -> Access:
        """How to reach the run's endpoint now."""
        ...

    def all_of(self, run: Run) -> list[str]:
        """What `remove` with "all" would delete."""
        ...

    def remove(self, run: Run, only: str, progress: Progress) -> list[str]:
        """Delete what bills and wait for it; the receipt, a line for each thing.

        `only`: "run" (endpoint and cluster), "failed", "idle" or "all".
        """
        ...
