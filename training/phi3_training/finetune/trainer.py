"""The TRL trainer for already encoded conversations, with our progress and loss log.

Reads encoded rows; appends to run/finetune/loss.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from ..prompt import ChatFormat, Example
from ..recipe import FinetuneSection
from ..run import write_atomically
from .audit import Report, Row, Seen, audit, expected_labels
from .audit_packed import SeenPacked, audit_packed
from .compute import CpuTrainer, OwnLossTrainer
from .losses import find_loss
from .methods import learn_in_float32, peft_config
from .packing import PackedCollator, as_packed, packed_rows
from .runtime import Runtime
from .teach import Progress


class LossLog(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Writes each step's loss as a JSON line and tells the caller how far training is."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.losses: list[float] = []
        self._progress = progress

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any
    ) -> None:
        """Begin anew, or with the steps before the checkpoint that training goes on from."""
        entries = [entry for entry in state.log_history if "loss" in entry]
        self.losses = [float(entry["loss"]) for entry in entries]
        if state.is_world_process_zero:
            text = "".join(_line(e["step"], e["epoch"], e) for e in entries)
            write_atomically(self.path, text)

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
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line(state.global_step, float(state.epoch or 0.0), logs))
        epoch = f"epoch {int(state.epoch or 0) + 1}"
        self._progress(state.global_step, state.max_steps, f"{epoch}, loss {self.losses[-1]:.3f}")


def _line(step: int, epoch: float, logs: dict[str, float]) -> str:
    line = {
        "step": step,
        "epoch": round(epoch, 4),
        "loss": float(logs["loss"]),
        "token_accuracy": logs.get("mean_token_accuracy"),
        "learning_rate": logs.get("learning_rate"),
    }
    return json.dumps(line) + "\n"


@dataclass(frozen=True)
class Rows:
    """What is learnt, what is looked at meanwhile (if anything), and how both are padded."""

    train: Sequence[Example]
    validation: Sequence[Example]
    limit: int  # tokens of a packed row
    pad_token_id: int


def make_trainer(
    model: Any,
    folder: Path,
    rows: Rows,
    settings: FinetuneSection,
    runtime: Runtime,
    callbacks: Sequence[TrainerCallback],
    output: Path,
) -> SFTTrainer:
    """A trainer that learns exactly the marked tokens of `rows.train`."""
    loss = None if settings.loss is None else find_loss(settings.loss)
    trainer = _kind(settings, runtime)(
        model=model,
        args=_arguments(settings, runtime, output, bool(rows.validation)),
        data_collator=PackedCollator(rows.pad_token_id) if settings.packing else None,
        train_dataset=_dataset(rows.train, rows.limit, packing=settings.packing),
        eval_dataset=_dataset(rows.validation, rows.limit, packing=settings.packing)
        if rows.validation
        else None,
        processing_class=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        peft_config=peft_config(settings),
        callbacks=list(callbacks),
    )
    if loss is not None:
        trainer.own_loss = loss
    if settings.method == "qlora" and runtime.dtype == "float16":
        learn_in_float32(trainer.model)
    trainer.remove_callback(PrinterCallback)
    return trainer


def audit_trainer(trainer: SFTTrainer, rows: Sequence[Row], chat: ChatFormat) -> Report:
    """The label audit of the rows as the trainer hands them to the model."""
    size = trainer.args.per_device_train_batch_size
    data = trainer.train_dataset
    seen: list[Seen] = []
    packed: list[SeenPacked] = []
    for first in range(0, len(data), size):
        chosen = [data[i] for i in range(first, min(first + size, len(data)))]
        batch = trainer.data_collator(chosen)
        for number, row in enumerate(chosen):
            if "seq_lengths" in row:
                packed.append(as_packed(row, batch, number))
                continue
            real = batch["attention_mask"][number].bool()
            ids, labels = batch["input_ids"][number][real], batch["labels"][number][real]
            seen.append(Seen(ids.tolist(), labels.tolist()))
    return audit_packed(rows, packed, chat) if packed else audit(rows, seen, chat)


def _kind(settings: FinetuneSection, runtime: Runtime) -> type[SFTTrainer]:
    if settings.loss is not None:
        return OwnLossTrainer
    # Several processes exchange gradients in the whole model's own call, which CpuTrainer avoids.
    alone = settings.num_processes == 1
    return CpuTrainer if runtime.device == "cpu" and alone else SFTTrainer


def _dataset(examples: Sequence[Example], limit: int, *, packing: bool) -> Dataset:
    """The rows as TRL takes them unchanged: ids, and labels only where something is learnt."""
    if packing:
        return packed_rows(examples, limit)
    return Dataset.from_dict(
        {
            "input_ids": [example.input_ids for example in examples],
            "labels": [expected_labels(example) for example in examples],
        }
    )


def _arguments(
    settings: FinetuneSection, runtime: Runtime, output: Path, evaluates: bool
) -> SFTConfig:
    several = settings.num_processes > 1
    return SFTConfig(
        output_dir=str(output),
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps or -1,  # -1: as the epochs say
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        neftune_noise_alpha=settings.neftune_noise_alpha,
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
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        # Keeping every score of the vocabulary is what fills a GPU in the evaluation step.
        prediction_loss_only=True,
        ddp_backend="gloo" if several and runtime.device == "cpu" else None,
        ddp_find_unused_parameters=False if several else None,
        report_to=[],  # our own callbacks do, see tracking.py
        disable_tqdm=True,
    )
