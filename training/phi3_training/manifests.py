"""What each stage leaves in the run folder: a class for every manifest, `<stage>.json` on the disk.

A manifest of this machine and one of Azure have the same class; what only one of them has is
optional. Unknown keys are ignored on reading, unset keys are left out on writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

# Of every manifest's file. A file of another version is refused, with the command that makes it
# again: guessing at the meaning of old keys could deploy the wrong model.
VERSION = 1

Figure = int | float  # counts stay whole numbers on the disk


class Part(BaseModel):
    """A part of a manifest."""

    # extra="ignore": a folder that a newer version wrote opens in this one. defer_build: pydantic
    # compiles a class when it is first used, since a command needs few of them.
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class Manifest(Part):
    """What every manifest has. `journey.do` adds what shows whether the stage is still done."""

    STAGE: ClassVar[str]  # the name of its file
    COMMAND: ClassVar[str]  # makes it, with --run NAME added

    target: str | None = None  # where the stage was done; None: on this machine
    choices: Sequence[str] = ()  # what was chosen for the user, each with its reason
    fingerprint: str | None = None  # of what the stage depends on
    done_id: str | None = None  # another one each time the stage is done
    seconds: float | None = None

    @property
    def is_here(self) -> bool:
        """Whether the stage was done on this machine, so that its files are in the run folder."""
        return self.target in (None, "local")

    def as_json(self) -> dict[str, object]:
        """As in the file: plain values, without unset ones."""
        # Unset is not null: a reader can tell "not known" from what a target does not have.
        content = self.model_dump(exclude_unset=True)
        return {"version": VERSION, "stage": self.STAGE, **content}


class Source(Part):
    """A file or set that chats were read from."""

    path: str
    sha256: str
    bytes: int | None = None
    rows: int | None = None
    formats: Mapping[str, int] = {}


class Prepared(Part):
    """A file of prepared chats, inside the run folder."""

    path: str
    sha256: str
    rows: int


class TokenLengths(Part):
    """How long conversations are in tokens; `how` says whether they were counted or estimated."""

    rows: int
    median: int
    mean: float
    p95: int
    longest: int
    total: int
    how: str

    def __str__(self) -> str:
        return (
            f"tokens: median {self.median}, 95th percentile {self.p95}, longest {self.longest}, "
            f"total {self.total} ({self.how})"
        )


class DatasetManifest(Manifest):
    """The prepared chats; `inputs` and `outputs` by part: train, validation, replay."""

    STAGE = "dataset"
    COMMAND = "phi3 data prepare"

    inputs: Mapping[str, Sequence[Source]] = {}
    outputs: Mapping[str, Prepared]
    seed: int | None = None
    settings: Mapping[str, Any] = {}
    removed: Mapping[str, int] = {}
    warnings: Mapping[str, int] = {}
    report: str | None = None
    tokens: TokenLengths | None = None
    held_out: Mapping[str, int] | None = None

    @property
    def summary(self) -> str:
        """The rows of each part, for the line of the stage."""
        counts = [f"{part.rows} {name}" for name, part in self.outputs.items()]
        return ", ".join(counts) + " conversations"


class BaseManifest(Manifest):
    """The model that is tuned; `path` counts from the run folder, or is absolute."""

    STAGE = "base"
    COMMAND = "phi3 train"

    path: str
    made: str = ""
    summary: str = ""
    settings: Mapping[str, Any] = {}
    # Of a tiny model that was made here.
    parameters: int | None = None
    conversations: int | None = None
    tokens: int | None = None
    learnt_tokens: int | None = None
    losses: Sequence[float] = ()
    steps: int | None = None
    cpu_seconds: float | None = None
    # On Azure.
    route: str | None = None
    revision: str | None = None


class Foundation(Part):
    """A model of Azure's catalogue."""

    name: str
    version: str
    id: str


class TrainedShare(Part):
    """Which share of a row's tokens is learnt, over all rows."""

    least: float
    median: float
    most: float


class LabelAudit(Part):
    """What the label audit found in the rows before the first step."""

    rows: int
    trained_share: TrainedShare
    answers_as_context: int = 0
    allow: Sequence[str] = ()
    allowed_findings: Mapping[str, int] = {}  # by rule


class ModelManifest(Manifest):
    """The tuned model; `path` is its folder inside the run folder."""

    STAGE = "model"
    COMMAND = "phi3 train"

    path: str
    adapter: str | None = None  # the adapter's folder; None: all weights were trained
    summary: str = ""
    loss_log: str = "finetune/loss.jsonl"
    conversations: Mapping[str, int] = {}
    audit: LabelAudit | None = None
    parameters: int | None = None
    trained_parameters: int | None = None
    tokens: int | None = None
    learnt_tokens: int | None = None
    steps: int | None = None
    first_loss: float | None = None
    final_loss: float | None = None
    validation_loss: float | None = None
    settings: Mapping[str, Any] = {}
    # On Azure.
    route: str = ""
    job: str = ""
    output: str = ""
    model_output: str | None = None
    output_path: str | None = None
    model_type: str | None = None
    studio_url: str | None = None
    display_name: str | None = None
    foundation_model: Foundation | None = None
    base_revision: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A metric of both models on the same rows; intervals are percentiles of the resamples."""

    rows: int
    before: float
    after: float
    change: float
    low: float
    high: float
    before_low: float
    before_high: float
    after_low: float
    after_high: float


class Asked(Part):
    """The recipe's own question, and both models' answers."""

    question: str
    before: str
    after: str


class Resampling(Part):
    """How the intervals were made, with the rest of the recipe's section `evaluate`."""

    model_config = ConfigDict(extra="allow")

    confidence: float
    resamples: int
    seed: int


class MetricsManifest(Manifest):
    """The figures of both models, by part and metric."""

    STAGE = "metrics"
    COMMAND = "phi3 evaluate"

    before: Mapping[str, Mapping[str, Figure]]
    after: Mapping[str, Mapping[str, Figure]]
    comparisons: Mapping[str, Mapping[str, Comparison]]
    ask: Asked | None = None
    rows: str  # the file of all answers, inside the run folder
    answered_by: Mapping[str, str] = {}
    settings: Resampling
    # On Azure.
    asked: str | None = None  # fingerprint of what the models were asked
    job: str | None = None

    @property
    def summary(self) -> str:
        """What tuning did to the answers, part by part, for the line of the stage."""
        parts = [
            f"{name} {self.before[name]['contains']:.0%} → {self.after[name]['contains']:.0%}"
            for name in self.after
            if "contains" in self.after[name]
        ]
        return "expected words: " + ", ".join(parts)


class NamedRow(Part):
    """A question whose answers did most to fail a rule."""

    part: str
    line: int  # of the prepared file
    origin: str = ""  # file and line of the user's own file, where they are known
    question: str
    expected: str
    before: str
    after: str


class RuleVerdict(Part):
    """A rule of the gate and how it came out; without figures where the rows were too few."""

    kind: str
    part: str
    metric: str
    value: float
    confidence: float
    rows: int
    passed: bool
    reason: str
    rows_named: Sequence[NamedRow] = ()
    before: float | None = None
    after: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    before_low: float | None = None
    before_high: float | None = None
    after_low: float | None = None
    after_high: float | None = None


class GateManifest(Manifest):
    """Whether the tuned model may be deployed, and why not."""

    STAGE = "gate"
    COMMAND = "phi3 evaluate"

    passed: bool
    rules: Sequence[RuleVerdict]
    remarks: Sequence[str] = ()
    report: str = ""  # the page, inside the run folder


class RegistrationManifest(Manifest):
    """The tuned model in a registry."""

    STAGE = "registration"
    COMMAND = "phi3 register"

    model: str
    model_version: str
    # On this machine.
    store: str | None = None
    tracking_uri: str | None = None
    mlflow_run_id: str | None = None
    # On Azure.
    model_id: str | None = None
    tags: Mapping[str, str] = {}

    @property
    def summary(self) -> str:
        """The model's version, and that it did not pass its gate where it did not."""
        blocked = self.tags.get("gate_passed") == "False"
        mark = ", tagged gate_passed=False: it did not pass the gate" if blocked else ""
        return f"{self.model} version {self.model_version}{mark}"


class GatePassage(Part):
    """The gate's verdict on a deployed model; `failed`: rules that --force overruled."""

    passed: bool
    forced: bool
    failed: Sequence[str] = ()


class EndpointManifest(Manifest):
    """The endpoint of the tuned model; never its key."""

    STAGE = "endpoint"
    COMMAND = "phi3 deploy"

    endpoint: str = Field(min_length=1)  # the URL
    engine: str = ""
    deployment: str = ""
    dialect: str | None = None
    context_length: int | None = None
    gate: GatePassage | None = None
    of: str | None = None  # done_id of the model that is served
    # On this machine.
    pid: int | None = None
    create_time: float | None = None
    port: int | None = None
    log: str | None = None
    # On Azure.
    endpoint_name: str = ""
    auth_mode: str | None = None
    instance_type: str | None = None
    instance_count: int | None = None
    traffic: Mapping[str, int] = {}
    traffic_before: Mapping[str, int] = {}
    smoke: Mapping[str, Any] = {}


class RolloutManifest(Manifest):
    """An endpoint's traffic before its last change, and how far the change has come."""

    STAGE = "rollout"
    COMMAND = "phi3 deploy"

    endpoint_name: str
    deployment: str  # that is to get the traffic
    before: Mapping[str, int]  # percent for each deployment that had any
    models: Mapping[str, str] = {}  # of those deployments, at that time
    share: int = 0  # percent that the deployment was last given
    state: Literal["begun", "done", "undone"] = "begun"
    started: str = ""  # UTC
    reasons: Sequence[str] = ()  # why it was undone

    @property
    def unfinished(self) -> str:
        """What an interrupted change has left, in words; empty where it was ended."""
        if self.state != "begun":
            return ""
        before = ", ".join(f"{name} {share} %" for name, share in self.before.items()) or "nobody"
        return (
            f"the rollout of {self.deployment} at {self.endpoint_name} was begun at {self.started} "
            f"and not finished: it was last given {self.share} % of the traffic (before: {before})"
        )


class ConnectionManifest(Manifest):
    """The Prompt flow connection to the endpoint; never its key."""

    STAGE = "connection"
    COMMAND = "phi3 connect"

    name: str  # the flow's connection, which leads to the current run
    own: str | None = None  # the run's own connection in the same store
    endpoint: str
    deployment: str | None = None
    dialect: str | None = None
    context_length: str | None = None
    store: str | None = None
    protection: str | None = None
    workspaces: Sequence[str] = ()  # on Azure: where it is as well


class AnswerManifest(Manifest):
    """The recipe's question, answered through the flow."""

    STAGE = "answer"
    COMMAND = "phi3 up"

    question: str
    answer: str
    asked_through: Sequence[str] = ()  # on Azure: the places of the connections
    through_flow: bool = True  # False: of the endpoint itself, where Prompt flow is missing


class ProvisionManifest(Manifest):
    """What Azure has of what the journey needs; names and ids."""

    STAGE = "azure"
    COMMAND = "phi3 up"

    steps: Sequence[Mapping[str, str]] = ()
    identity_id: str | None = None
    principal_id: str | None = None
    storage_account: str | None = None
    key_vault: str | None = None
    application_insights: str | None = None
    container_registry: str | None = None
    summary: str


class PlaceManifest(Manifest):
    """Where a run is, for one that is not on this machine; the names of everything there."""

    STAGE = "place"
    COMMAND = "phi3 up --on azure"

    subscription_id: str | None = None
    resource_group: str | None = None
    workspace_name: str | None = None
    location: str | None = None
    tenant_id: str | None = None
    storage_account: str | None = None
    key_vault: str | None = None
    application_insights: str | None = None
    log_analytics: str | None = None
    container_registry: str | None = None
    identity: str | None = None
    hub: str | None = None
    project: str | None = None


@dataclass(frozen=True)
class Limits:
    """What is allowed at most (or, for agreement, at least); `why` says where it comes from.

    `weights`: root mean square of a layer's deviation, as a share of the layer's own. `change`:
    the same as a share of what the adapter changed in it.
    """

    token_agreement: float
    mean_kl: float
    worst_kl: float
    lost_answers: float
    weights: float
    change: float
    why: str


class HeldOutCheck(Part):
    """Exact match on the held-out rows before and after an export."""

    rows: int
    exact_match_before: float
    exact_match: float
    delta: float
    lost: Sequence[str] = ()


class LayerDeviation(Part):
    """How far a merged layer is from base plus adapter; see Limits for the two shares."""

    name: str
    weights: float
    change: float


class LayersCheck(Part):
    """The layers of a merged model that are furthest from base plus adapter."""

    count: int
    largest: float
    layer: str
    largest_change: float
    furthest: Sequence[LayerDeviation] = ()


class ExportCheck(Part):
    """An export compared with the original; only a `note` if nothing can differ."""

    passed: bool
    problems: Sequence[str] = ()
    note: str | None = None
    compared_with: str = ""
    prompts: int = 0
    tokens: int = 0
    token_agreement: float = 0.0
    answers_alike: int = 0
    mean_kl: float = 0.0
    worst_kl: float = 0.0
    worst_prompt: str = ""
    held_out: HeldOutCheck | None = None
    layers: LayersCheck | None = None
    limits: Limits | None = None


class ExportManifest(Manifest):
    """The tuned model in another form; each form has a class of its own in EXPORTS."""

    path: str
    of: str | None = None  # done_id of the exported model
    precision: str | None = None
    bytes: int | None = None
    check: ExportCheck | None = None


class MergedExport(ExportManifest):
    """The merged model, which the training has written already."""

    STAGE = "export-merged"
    COMMAND = "phi3 export --to merged"


class OnnxFp32Export(ExportManifest):
    """An ONNX folder in float32."""

    STAGE = "export-onnx-fp32"
    COMMAND = "phi3 export --to onnx-fp32"


class OnnxInt8Export(ExportManifest):
    """An ONNX folder in 8 bits."""

    STAGE = "export-onnx-int8"
    COMMAND = "phi3 export --to onnx-int8"


class OnnxInt4Export(ExportManifest):
    """An ONNX folder in 4 bits."""

    STAGE = "export-onnx-int4"
    COMMAND = "phi3 export --to onnx-int4"


EXPORTS: dict[str, type[ExportManifest]] = {
    kind.STAGE.removeprefix("export-"): kind
    for kind in (MergedExport, OnnxFp32Export, OnnxInt8Export, OnnxInt4Export)
}
