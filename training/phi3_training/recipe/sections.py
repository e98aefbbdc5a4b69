"""The recipe's sections, the Azure one apart: each key, its default and what it may be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)

from ..engine import EngineName, Origin
from ..models.catalogue import SMALL, TINY

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Confidence = Annotated[float, Field(ge=0.5, lt=1.0)]
Rule = TypeVar("Rule")
OneOrMany = Annotated[list[Rule], BeforeValidator(lambda v: [v] if isinstance(v, dict) else v)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """Base of the recipe's sections: unknown keys are faults, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# The recipe's section `data:`: where the chats come from and what is done with repeated ones.

HUB = "hub:"
DEFAULT_SET = "HuggingFaceH4/ultrachat_200k"
DEFAULT_SPLIT = "train_sft[:1%]"
_HUB_FORM = re.compile(r"hub:(?P<name>[^@:]*)(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?")


class HubSet(BaseModel):
    """A data set of the Hugging Face hub (or its folder): `hub:NAME[@REVISION][:SPLIT]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = DEFAULT_SET
    split: str = DEFAULT_SPLIT
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSet:
        """Read the short form; what is left out is the set of the tutorials.

        Raises ValueError for any other form.
        """
        match = _HUB_FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"expected hub:NAME[@REVISION][:SPLIT], such as hub:{DEFAULT_SET}")
        return cls(**{key: value for key, value in match.groupdict().items() if value})

    @model_serializer
    def _short(self) -> str:
        return str(self)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.name}{revision}:{self.split}"


def _source(value: Any) -> Any:
    if value == {"hub": None}:  # YAML's reading of a bare `hub:`
        return HubSet()
    if isinstance(value, str) and value.startswith(HUB):
        return HubSet.parse(value)
    if not isinstance(value, (str, Path, HubSet)):
        raise ValueError('expected a file, a folder, or "hub:NAME:SPLIT" in quotes')  # noqa: TRY004 - pydantic collects ValueErrors
    return value


Source = Annotated[HubSet | Path, BeforeValidator(_source)]


class DataSection(Section):
    """The chats: training files, held-out files or a share, and old chats against forgetting.

    A source is a file (JSON lines, JSON, CSV, parquet), a folder of these, or `hub:NAME:SPLIT`.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    validation: list[Source] = []
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    replay: list[Source] = []
    duplicates: Literal["auto", "refuse", "remove"] = "auto"
    near_duplicates: Literal["auto", "warn", "remove"] = "auto"
    casual_copies: bool = False
    rewordings: Annotated[int, Field(ge=0, le=20)] = 0
    seed: int = 42
    max_length: Annotated[int, Field(ge=16)] = 2048


# The recipe's `finetune:` section: how the chats are learnt.

# The rules of the label audit (finetune/audit.py explains each).
AuditRule = Literal[
    "nothing-trained",
    "everything-trained",
    "cut-answer",
    "no-end",
    "pad-is-end",
    "answer-untrained",
    "question-trained",
    "shifted-labels",
    "other-tokens",
    "empty-system",
    "added-system",
    "packed-mask",
    "packed-sight",
]


class FinetuneSection(Section):
    """Hyper-parameters under Hugging Face's names."""

    method: Literal["lora", "dora", "qlora", "full"] = "lora"
    adapter: Name | None = None
    learning_rate: Rate = 2e-4
    num_train_epochs: Positive = 3
    max_steps: Positive | None = None
    per_device_train_batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 1
    lora_r: Positive = 16
    lora_alpha: Positive = 32
    lora_dropout: Share = 0.0
    neftune_noise_alpha: Annotated[float, Field(gt=0.0)] | None = None
    adapter_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    target_modules: str | list[str] = "all-linear"
    warmup_ratio: Share = 0.03
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    gradient_checkpointing: bool = False
    packing: bool = False
    loss: Name | None = None
    eval_steps: Positive | None = None
    early_stopping_patience: Positive | None = None
    save_steps: Positive | None = None
    save_seconds: Annotated[float, Field(gt=0.0)] | None = 60.0
    save_total_limit: Positive = 2
    seed: int = 42
    num_threads: Positive | None = None
    num_processes: Positive = 1
    num_machines: Positive = 1
    machine_rank: Annotated[int, Field(ge=0)] = 0
    main_process_ip: str | None = None
    main_process_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    report_to: list[Literal["tensorboard", "mlflow"]] = []
    allow: list[AuditRule] = []

    @field_validator("method", mode="before")
    @classmethod
    def _no_bottleneck(cls, value: object) -> object:
        if value in ("adapter", "bottleneck"):
            raise ValueError(
                "peft has no bottleneck adapters (extra layers between those of the model, which "
                "cannot be merged); lora and dora train as few weights and can be merged"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneSection:
        if self.method == "full" and self.adapter:
            raise ValueError("method full trains no adapter; remove adapter, or use lora")
        if self.adapter_weight < 1.0 and self.method not in ("lora", "qlora"):
            raise ValueError(
                "adapter_weight scales what a lora or qlora adapter adds; remove it for method "
                f"{self.method}"
            )
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience counts evaluations: set eval_steps as well")
        if self.num_processes % self.num_machines or self.machine_rank >= self.num_machines:
            raise ValueError(
                "num_processes counts all machines' processes and must be a multiple of "
                "num_machines; machine_rank counts from 0"
            )
        if self.num_machines > 1 and not (self.main_process_ip and self.main_process_port):
            raise ValueError("several machines need main_process_ip and main_process_port")
        return self


class ModelSection(Section):
    """The model to fine-tune: `tiny`, `small`, a Hugging Face id, or a folder of weights.

    `phi3 models` lists them.
    """

    name_or_path: Annotated[str, Field(min_length=1)] = TINY
    revision: str | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @property
    def is_tiny(self) -> bool:
        """Whether the base model is the tiny Phi-3 that phi3 trains itself."""
        return self.name_or_path == TINY

    @property
    def is_small(self) -> bool:
        """Whether the base model is the pretrained one that comes as a wheel."""
        return self.name_or_path == SMALL


class BaseSection(Section):
    """How the tiny Phi-3 is built and trained from scratch; only for `model.name_or_path: tiny`."""

    data: Annotated[list[Path], Field(min_length=1)]
    vocab_size: Annotated[int, Field(ge=300)] = 2048
    hidden_size: Positive = 128
    intermediate_size: Positive = 256
    num_hidden_layers: Positive = 2
    num_attention_heads: Positive = 4
    max_position_embeddings: Annotated[int, Field(ge=64)] = 512
    learning_rate: Rate = 6e-3
    num_train_epochs: Positive = 30
    per_device_train_batch_size: Positive = 32
    target_loss: Annotated[float, Field(ge=0.0)] = 0.012
    seed: int = 42

    @model_validator(mode="after")
    def _heads_divide(self) -> BaseSection:
        # ONNX Runtime's attention needs a head size that is a multiple of 16.
        if self.hidden_size % (16 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 16 x num_attention_heads")
        return self


class EvaluateSection(Section):
    """How both models are evaluated; `canary` and `probes`: None means the shipped files."""

    max_new_tokens: Positive = 64
    max_rows: Positive | None = None
    per_device_eval_batch_size: Positive = 32
    canary: list[Path] | None = None
    probes: list[Path] | None = None
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    confidence: Confidence = 0.95
    seed: Annotated[int, Field(ge=0)] = 42


class GateRule(Section):
    """One rule of the gate: a metric of a part, by how much, at which confidence."""

    metric: Literal[
        "exact_match",
        "contains",
        "token_f1",
        "f1_over_lookalikes",
        "rouge_l",
        "bleu",
        "chrf",
        "perplexity",
    ]
    part: Literal["validation", "train", "replay", "canary"] = "validation"
    value: Annotated[float, Field(ge=0.0)] = 0.0
    confidence: Confidence = 0.95


class RefusalRule(Section):
    """By how much the share of refused requests may change in either direction."""

    metric: Literal["refusal_rate"] = "refusal_rate"
    part: Literal["validation", "train", "replay", "canary", "probes"] = "probes"
    value: Share = 0.2
    confidence: Confidence = 0.95


class GateSection(Section):
    """What a model must achieve before it is deployed; an empty list means no rule."""

    min_gain: OneOrMany[GateRule] = [GateRule(metric="f1_over_lookalikes", value=0.02)]
    max_regression: OneOrMany[GateRule] = [GateRule(metric="contains", part="canary", value=0.2)]
    max_refusal_change: OneOrMany[RefusalRule] = [RefusalRule()]


class ServeSection(Section):
    """The local endpoint; limits have Azure ML's names."""

    engine: EngineName = "auto"
    precision: Literal["fp32", "int8", "int4"] = "fp32"
    adapters: bool = False
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    max_concurrent_requests_per_instance: Positive = 32
    request_timeout_ms: Annotated[int, Field(ge=100, le=180_000)] = 60_000
    max_request_bytes: Annotated[int, Field(ge=1024)] = 1_500_000
    max_new_tokens: Positive = 256
    # Pages of these origins may call the endpoint from a browser, e.g. http://localhost:3000
    cors_origins: list[Origin] = []
    upstream_url: str | None = None
    upstream_model: str | None = None

    @model_validator(mode="after")
    def _upstream_has_url(self) -> ServeSection:
        if self.engine == "upstream" and not self.upstream_url:
            raise ValueError("engine upstream needs upstream_url, e.g. http://127.0.0.1:11434/v1")
        if self.adapters and self.engine not in ("auto", "transformers"):
            raise ValueError("only the engine transformers serves several adapters")
        return self


class ConnectionSection(Section):
    """The Prompt flow connection that the flow names."""

    name: Name = "phi3_connection"
    # score is what the tutorials' endpoints speak; openai streams
    dialect: Literal["score", "openai"] = "score"
