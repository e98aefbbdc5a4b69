"""The TRL trainer for already encoded conversations, with our progress and loss log.

Reads encoded rows; appends to run/finetune/loss.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from ..prompt import Example
from ..recipe import FinetuneSection
from .runtime import Runtime
from .teach import Progress

IGNORED = -100


class LossLog(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Writes each step's loss as a JSON line and tells the caller how far training is."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.losses: list[float] = []
        self._progress = progress
        path.write_text("", encoding="utf-8")

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Called by the trainer after each step with its figures."""
        if not logs or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        line = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0.0), 4),
            "loss": self.losses[-1],
            "token_accuracy": logs.get("mean_token_accuracy"),
            "learning_rate": logs.get("learning_rate"),
        }
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        epoch = f"epoch {int(state.epoch or 0) + 1}"
        self._progress(state.global_step, state.max_steps, f"{epoch}, loss {self.losses[-1]:.3f}")


class CpuTrainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """The same loss, scored only where something is learnt.

    TRL's own loss saves a GPU's memory by scoring every position twice and piece by piece; on a
    CPU that is more than half of the training time of a small model.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | None = None,
        **_options: Any,
    ) -> torch.Tensor:
        """Mean cross entropy of the learnt tokens; padding stands on the right, unseen by them."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = plain.base_model(input_ids=inputs["input_ids"], use_cache=False)[0]
        labels = inputs["labels"][:, 1:]
        learnt = labels != IGNORED
        logits = plain.get_output_embeddings()(hidden[:, :-1][learnt])
        loss = torch.nn.functional.cross_entropy(logits, labels[learnt], reduction="sum")
        return loss / (learnt.sum() if num_items_in_batch is None else num_items_in_batch)


def labelled(examples: Sequence[Example]) -> Dataset:
    """The rows as TRL takes them unchanged: ids, and labels only where something is learnt."""
    return Dataset.from_dict(
        {
            "input_ids": [example.input_ids for example in examples],
            "labels": [
                [
                    token if learnt else IGNORED
                    for token, learnt in zip(example.input_ids, example.assistant_mask, strict=True)
                ]
                for example in examples
            ],
        }
    )


def make_trainer(
    model: Any,
    folder: Path,
    examples: Sequence[Example],
    settings: FinetuneSection,
    runtime: Runtime,
    log: LossLog,
) -> SFTTrainer:
    """A trainer that learns exactly the marked tokens of `examples`."""
    kind = CpuTrainer if runtime.device == "cpu" and runtime.dtype == "float32" else SFTTrainer
    trainer = kind(
        model=model,
        args=_arguments(settings, runtime, log.path.parent),
        train_dataset=labelled(examples),
        processing_class=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        peft_config=_lora(settings) if settings.method == "lora" else None,
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(settings: FinetuneSection, runtime: Runtime, output: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        warmup_steps=settings.warmup_ratio,  # a share of all steps, being below 1
        lr_scheduler_type=settings.lr_scheduler_type,
        weight_decay=settings.weight_decay,
        activation_checkpointing=settings.gradient_checkpointing,  # the recipe keeps the known name
        seed=settings.seed,
        bf16=runtime.dtype == "bfloat16",
        fp16=runtime.dtype == "float16",
        use_cpu=runtime.device == "cpu",
        dataloader_pin_memory=runtime.device == "cuda",
        train_sampling_strategy="group_by_length",
        # Rows come encoded and checked: nothing is to be cut, packed or written anew.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen, not smoothed away
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _lora(settings: FinetuneSection) -> LoraConfig:
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
