"""The recipe's `finetune:` section: how the chats are learnt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from .recipe_types import Name, Positive, Rate, Section, Share

# The rules of the label audit (finetune/audit_rules.py says what each means).
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
                "peft has no bottleneck adapters (layers put between those of the model, which "
                "cannot be merged); lora and dora train as few weights and can be merged"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneSection:
        if self.method == "full" and self.adapter:
            raise ValueError("method full makes no adapter; leave adapter out, or use lora")
        if self.adapter_weight < 1.0 and self.method not in ("lora", "qlora"):
            raise ValueError(
                "adapter_weight scales what a lora or qlora adapter adds; leave it out for "
                f"method {self.method}"
            )
        if self.early_stopping_patience and not self.eval_steps:
            raise ValueError("early_stopping_patience counts evaluations: give eval_steps as well")
        if self.num_processes % self.num_machines or self.machine_rank >= self.num_machines:
            raise ValueError(
                "num_processes counts all machines' processes and must be a multiple of "
                "num_machines; machine_rank counts from 0"
            )
        if self.num_machines > 1 and not (self.main_process_ip and self.main_process_port):
            raise ValueError("several machines need main_process_ip and main_process_port")
        return self
