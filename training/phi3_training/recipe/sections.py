"""The recipe's sections, the Azure one apart: each key, its default and what it may be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

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

    # The text under each key is its description: `phi3 recipes --keys` shows it.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


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


def _source(value: object) -> object:
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
    """The chats to train on: files (JSON lines, JSON, CSV, parquet), folders, or hub:NAME:SPLIT."""
    validation: list[Source] = []
    """Chats held out for the comparison; an empty list holds back a share of data.train."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of data.train that is held back where data.validation names no chats."""
    # On the tiny model every method without them forgot the older chats (2 to 8 % of 200 questions
    # still right); with all of them mixed in, none was lost.
    replay: list[Source] = []
    """Older chats mixed into the training, so that less of what the model knew is lost."""
    duplicates: Literal["auto", "refuse", "remove"] = "auto"
    """Identical chats, also between trained and held-out ones: refuse stops at them, remove keeps
    one of each; auto removes them from sets of the hub and refuses them elsewhere."""
    near_duplicates: Literal["auto", "warn", "remove"] = "auto"
    """Nearly identical chats: warn reports them, remove keeps one of each; auto removes them from
    sets of the hub and reports them elsewhere."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Faulty rows: refuse stops at them, skip leaves them out, lists them and counts them."""
    too_long: Literal["refuse", "skip", "cut"] = "refuse"
    """Conversations beyond data.max_length: refuse stops, skip leaves them out, cut trains on their
    first data.max_length tokens."""
    max_skipped: Share = 0.05
    """Largest share of the rows of a part that may be skipped or cut; more stops the run."""
    casual_copies: bool = False
    """Also train on each chat with its last question in lower case and without its final mark."""
    rewordings: Annotated[int, Field(ge=0, le=20)] = 0
    """Rewordings of the last question added for each chat: other English forms ("What does X cost?"
    for "How much is X?"), greetings, keywords, words left out."""
    seed: int = 42
    """Random seed of the held-out share and of the rewordings."""
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Longest conversation in tokens; a longer one stops the run, unless its cut is allowed."""


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
    """How the model learns: an adapter (lora, dora), an adapter over 4-bit weights on a CUDA GPU
    (qlora), or all weights (full)."""
    adapter: Name | None = None
    """Name of the adapter, written to run/adapters/NAME; none: run/adapter."""
    # What LoRA on billions of weights takes: QLoRA (https://arxiv.org/abs/2305.14314) used 2e-4 up
    # to 13 B. The tiny model of 0.7 M learns only from some 8e-3 on: its recipe says so.
    learning_rate: Rate = 2e-4
    """Step size of the optimiser (AdamW) after the warm-up."""
    num_train_epochs: Positive = 3
    """How often each chat is trained on."""
    max_steps: Positive | None = None
    """Number of optimiser steps; overrides num_train_epochs. none: as the epochs say."""
    per_device_train_batch_size: Positive = 4
    """Conversations in a batch on each device."""
    gradient_accumulation_steps: Positive = 1
    """Batches for each optimiser step; affects memory, not what is learnt from a step."""
    lora_r: Positive = 16
    """Rank of the adapter's matrices: more learns more, and needs more memory."""
    lora_alpha: Positive = 32
    """Scale of the adapter: its output is multiplied by lora_alpha / lora_r."""
    lora_dropout: Share = 0.0
    """Share of the adapter's inputs set to zero during training."""
    neftune_noise_alpha: Annotated[float, Field(gt=0.0)] | None = None
    """Strength of the noise added to embeddings during training (5 is common); none: no noise."""
    adapter_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor by which the adapter's update is scaled when it is saved (lora, qlora); below 1
    forgets less."""
    # Of 100 new answers the tiny model with rank 32 learnt 99 on all matrices, 60 on qkv_proj and
    # o_proj alone.
    target_modules: str | list[str] = "all-linear"
    """The layers that get an adapter: all-linear, a list of names such as [qkv_proj, o_proj], or a
    regular expression for whole names. Each name must be one of the model's."""
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay of AdamW."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time, the same
    losses."""
    packing: bool = False
    """Let short conversations share a row of data.max_length tokens; none sees another."""
    loss: Name | None = None
    """A loss registered by name (contrastive, or one of your package); none: cross entropy."""
    eval_steps: Positive | None = None
    """Evaluate on the held-out chats every so many steps; none: only after the training."""
    early_stopping_patience: Positive | None = None
    """Stop after so many evaluations without improvement and use the best weights; none: never."""
    save_steps: Positive | None = None
    """Write a checkpoint every so many steps; none: by save_seconds alone."""
    # Whatever it says, saving takes 5 % of the time at most (callbacks.py).
    save_seconds: Annotated[float, Field(gt=0.0)] | None = 60.0
    """Write a checkpoint every so many seconds; none: by save_steps alone."""
    save_total_limit: Positive = 2
    """Number of checkpoints kept; older ones are deleted."""
    seed: int = 42
    """Random seed of the adapter's weights and of the order of the chats."""
    num_threads: Positive | None = None
    """CPU threads for training and serving; none: chosen for the model."""
    num_processes: Positive = 1
    """Training processes of all machines together, one for each GPU."""
    num_machines: Positive = 1
    """Machines that train together."""
    machine_rank: Annotated[int, Field(ge=0)] = 0
    """Number of this machine, counted from 0."""
    main_process_ip: str | None = None
    """Address of machine 0; needed with several machines."""
    main_process_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port of machine 0; needed with several machines."""
    report_to: list[Literal["tensorboard", "mlflow"]] = []
    """Also write the training's figures to tensorboard (run/tensorboard) or mlflow
    (run/mlflow.db)."""
    allow: list[AuditRule] = []
    """Rules of the label audit that may be broken (docs/training.md); recorded in the run."""

    @field_validator("method", mode="before")
    @classmethod
    def _no_bottleneck(cls, value: object) -> object:
        if value in ("adapter", "bottleneck"):
            raise ValueError(
                "peft has no bottleneck adapters (extra layers between those of the model, which "
                "cannot be merged); lora and dora train as few weights and can be merged"
            )
        return value

    # Keys that make no sense together are refused here, before weights are loaded: some minutes
    # later peft and accelerate would say it in words of their own.
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
    """The base model: tiny, small, a Hugging Face id, or a folder of weights; see phi3 models."""
    revision: str | None = None
    """Branch, tag or commit of the Hugging Face repository; none: main."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention code in transformers; none: transformers' own choice (sdpa)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the computation; auto: bfloat16 where a GPU supports it, else
    float16; float32 on a CPU."""

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
    """The chats that the tiny model is trained on from scratch: a list of files."""
    # 270 tokens are there in any case: 256 bytes, and 14 that control (weights.py).
    vocab_size: Annotated[int, Field(ge=300)] = 2048
    """Tokens of the tiny model's tokenizer."""
    hidden_size: Positive = 128
    """Width of the tiny model; a multiple of 16 x num_attention_heads."""
    intermediate_size: Positive = 256
    """Width of its MLP."""
    num_hidden_layers: Positive = 2
    """Number of its layers."""
    num_attention_heads: Positive = 4
    """Number of its attention heads."""
    max_position_embeddings: Annotated[int, Field(ge=64)] = 512
    """Its context in tokens."""
    learning_rate: Rate = 6e-3
    """Step size of the training from scratch."""
    num_train_epochs: Positive = 30
    """The most epochs of that training; it ends earlier at target_loss."""
    per_device_train_batch_size: Positive = 32
    """Conversations in a batch of that training."""
    target_loss: Annotated[float, Field(ge=0.0)] = 0.012
    """That training ends when the mean loss of an epoch (nats per token) is below this."""
    seed: int = 42
    """Random seed of its weights and of the order of its chats."""

    @model_validator(mode="after")
    def _heads_divide(self) -> BaseSection:
        # ONNX Runtime's attention needs a head size that is a multiple of 16.
        if self.hidden_size % (16 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 16 x num_attention_heads")
        return self


class EvaluateSection(Section):
    """How both models are evaluated; `canary` and `probes`: None means the shipped files."""

    max_new_tokens: Positive = 64
    """Longest answer in tokens."""
    max_rows: Positive | None = None
    """The most questions of each chat part, spread evenly over the file; none: all."""
    per_device_eval_batch_size: Positive = 32
    """Questions answered at once, each with its own key/value cache."""
    canary: list[Path] | None = None
    """Files of general questions that it must still answer; none: the shipped ones, []: no
    files."""
    probes: list[Path] | None = None
    """Files of requests that it should refuse; none: the shipped ones, []: no files."""
    # Of 1,000 the ends of a 95 % interval are the 25th and the 975th; of 100 the 3rd and the 97th.
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    """Bootstrap resamples for the confidence intervals."""
    confidence: Confidence = 0.95
    """Confidence of the intervals that are shown; a rule of the gate has its own."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Random seed of the resampling."""


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
    """The metric that is judged (docs/evaluation.md explains each)."""
    part: Literal["validation", "train", "replay", "canary"] = "validation"
    """The questions it is judged on: held-out, trained, replayed chats, or general questions."""
    value: Annotated[float, Field(ge=0.0)] = 0.0
    """Gain required, or loss allowed, in the metric's own unit (0.02 of a share: 2 points)."""
    confidence: Confidence = 0.95
    """Confidence of the interval whose worse end must hold."""


class RefusalRule(Section):
    """By how much the share of refused requests may change in either direction."""

    metric: Literal["refusal_rate"] = "refusal_rate"
    """Share of the answers that decline."""
    part: Literal["validation", "train", "replay", "canary", "probes"] = "probes"
    """The questions it is judged on."""
    value: Share = 0.2
    """Largest change of that share in either direction (0.2: 20 points)."""
    confidence: Confidence = 0.95
    """Confidence of the interval, all of which must hold."""


class GateSection(Section):
    """What a model must achieve before it is deployed; an empty list means no rule."""

    min_gain: OneOrMany[GateRule] = [GateRule(metric="f1_over_lookalikes", value=0.02)]
    """Rules of gains that the tuned model must show; []: none."""
    max_regression: OneOrMany[GateRule] = [GateRule(metric="contains", part="canary", value=0.2)]
    """Rules of losses that it must not show; []: none."""
    max_refusal_change: OneOrMany[RefusalRule] = [RefusalRule()]
    """Rules of how far its refusals may change; []: none."""


class ServeSection(Section):
    """The local endpoint; limits have Azure ML's names."""

    engine: EngineName = "auto"
    """What answers: transformers, onnxruntime, or another server (upstream); auto chooses for the
    machine."""
    precision: Literal["fp32", "int8", "int4"] = "fp32"
    """Number type of the weights that onnxruntime serves; int4 changes answers."""
    adapters: bool = False
    """Serve all named adapters of the run over one base, selected by the request's model."""
    host: str = "127.0.0.1"
    """Address that the endpoint listens on; 0.0.0.0 for all networks."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """TCP port of the endpoint; 0: a free one."""
    max_concurrent_requests_per_instance: Positive = 32
    """Requests answered or waiting at once; more get status 429."""
    # Azure's own most: what is tried here must be possible there.
    request_timeout_ms: Annotated[int, Field(ge=100, le=180_000)] = 60_000
    """Time limit of a request in milliseconds."""
    # Azure's documentation of 2021 and 2022 said 1.5 MB for its front door; today's has no number.
    max_request_bytes: Annotated[int, Field(ge=1024)] = 1_500_000
    """Largest request in bytes."""
    max_new_tokens: Positive = 256
    """Longest answer in tokens where the request does not say."""
    cors_origins: list[Origin] = []
    """Origins whose pages may call the endpoint from a browser, such as http://localhost:3000."""
    upstream_url: str | None = None
    """Base URL of the OpenAI-compatible server for the engine upstream."""
    upstream_model: str | None = None
    """Model name sent to that server; none: the first that it lists."""

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
    """Name of the Prompt flow connection that the flow uses."""
    # score is what the tutorials' endpoints speak; openai streams
    dialect: Literal["score", "openai"] = "score"
    """Protocol of the endpoint: score as in the tutorials, or openai, which streams."""
