"""The TRL trainer for already encoded conversations: its loss, packed rows, and its settings.

Reads encoded rows; writes nothing (its callbacks do).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from ..prompt import ChatFormat, Example
from ..recipe import FinetuneSection
from .audit import IGNORED, Report, Row, Seen, SeenPacked, audit, audit_packed, expected_labels
from .dense import DensePhi3, layouts
from .losses import Loss, LossInput, find_loss
from .runtime import Runtime
from .weights import learn_in_float32, peft_config

# How the loss is computed: TRL's way on a GPU, a shorter one on a CPU, or a custom loss.

Batch = dict[str, torch.Tensor]


class Trainer(SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's own, without a model card beside each checkpoint: nobody reads it.

    Rendering TRL's and peft's cards took half of the training time of the smallest models.
    """

    def create_model_card(self, *_: object, **__: object) -> None:
        """Called by TRL before it saves a checkpoint."""


class CpuTrainer(Trainer):
    """The same loss, computed only where something is learnt.

    TRL's own loss saves a GPU's memory by scoring every position twice and piece by piece; on a
    CPU that is more than half of the training time of a small model. A Phi-3 with a LoRA adapter
    takes the way of dense.py, other models their own.
    """

    _dense: tuple[DensePhi3 | None] | None = None

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | None = None,
        **options: object,
    ) -> torch.Tensor:
        """Mean cross entropy of the learnt tokens; padding is on the right, unseen by them.

        The dense way keeps the activations of one part of the batch at a time: the gradients of all
        parts but the last are added here.
        """
        if self._dense is None:
            checkpointing = bool(self.args.activation_checkpointing)
            self._dense = (DensePhi3.of(model, checkpointing=checkpointing),)
        (dense,) = self._dense
        labels = inputs["labels"][:, 1:]
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if dense is not None:
            *parts, last = layouts(inputs["labels"], inputs.get("position_ids"))
            done = torch.zeros(())
            with torch.autocast("cpu", enabled=False):
                for part in parts:
                    share = dense.loss(part, inputs["input_ids"]) / items
                    if torch.is_grad_enabled():
                        self.accelerator.backward(share)
                    done += share.detach()
                # The trainer's own backward pass is that of the last part.
                return dense.loss(last, inputs["input_ids"]) / items + done
        if self.args.bf16:  # as the recipe says, in torch's mixed precision
            loss: torch.Tensor = super().compute_loss(
                model, inputs, num_items_in_batch=num_items_in_batch, **options
            )
            return loss
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        positions = inputs.get("position_ids")
        hidden = plain.base_model(
            input_ids=inputs["input_ids"], position_ids=positions, use_cache=False
        )[0]
        learnt = labels != IGNORED
        logits = plain.get_output_embeddings()(hidden[:, :-1][learnt]).float()
        return torch.nn.functional.cross_entropy(logits, labels[learnt], reduction="sum") / items


class OwnLossTrainer(Trainer):
    """Learns by a loss of the entry point group; set `own_loss` before training."""

    own_loss: Loss

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: Batch,
        num_items_in_batch: torch.Tensor | None = None,
        **_options: object,
    ) -> torch.Tensor:
        """What the loss says of the model's states and scores."""
        seen = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**seen, use_cache=False, output_hidden_states=True)
        labels = inputs["labels"][:, 1:]
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        hidden, logits = outputs.hidden_states[-1][:, :-1], outputs.logits[:, :-1]
        loss = self.own_loss(LossInput(hidden, logits, labels, items))
        # `items` counts the tokens of all processes, whose gradients are averaged.
        shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return loss * self.accelerator.num_processes if shared else loss


# Packs short conversations into rows of one length; none sees another, masks stay as they are.
# Reads encoded conversations; the model gets positions that restart at each of them, from
# which its sdpa and eager attention build a block-diagonal mask.


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which rows go together: the longest first, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), sorted
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[row], -1))
        if at == len(room):
            left, number = size, len(bins)
            bins.append([])
        else:
            left, number = room.pop(at)
        bins[number].append(row)
        insort(room, (left - lengths[row], number))
    return bins


def packed_rows(examples: Sequence[Example], size: int) -> Dataset:
    """The conversations in rows of at most `size` tokens; `seq_lengths` says where each ends."""
    bins = pack([len(example.input_ids) for example in examples], size)
    return Dataset.from_dict(
        {
            "input_ids": [[t for i in bin_ for t in examples[i].input_ids] for bin_ in bins],
            "labels": [[t for i in bin_ for t in expected_labels(examples[i])] for bin_ in bins],
            "seq_lengths": [[len(examples[i].input_ids) for i in bin_] for bin_ in bins],
        }
    )


class PackedCollator:
    """Batches of packed rows: padded on the right, positions instead of an attention mask.

    An attention mask would make the model overlook the positions.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self._pad)
        labels = torch.full((len(rows), width), IGNORED)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[number, :size] = torch.tensor(row["input_ids"])
            labels[number, :size] = torch.tensor(row["labels"])
            # The padding is one more conversation, which no other one attends to.
            lengths = [*row["seq_lengths"], width - size]
            positions[number] = torch.cat([torch.arange(length) for length in lengths])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def as_packed(row: Mapping[str, Any], batch: Mapping[str, Tensor], number: int) -> SeenPacked:
    """Row `number` of a batch, its padding left out."""
    size = sum(row["seq_lengths"])
    ids, labels = batch["input_ids"][number, :size], batch["labels"][number, :size]
    return SeenPacked(ids.tolist(), labels.tolist(), batch["position_ids"][number, :size].tolist())


@dataclass(frozen=True)
class Rows:
    """What is trained on, what is evaluated during training (if anything), and the padding."""

    train: Sequence[Example]
    validation: Sequence[Example]
    limit: int  # tokens of a packed row
    pad_token_id: int


def make_trainer(
    model: PreTrainedModel,
    folder: Path,
    rows: Rows,
    settings: FinetuneSection,
    runtime: Runtime,
    callbacks: Sequence[TrainerCallback],
    output: Path,
) -> Trainer:
    """A trainer that learns exactly the marked tokens of `rows.train`."""
    loss = None if settings.loss is None else find_loss(settings.loss)
    # Several processes exchange gradients in the whole model's own call, which CpuTrainer avoids.
    alone = settings.num_processes == 1
    kind = CpuTrainer if runtime.device == "cpu" and alone else Trainer
    # The rows as TRL takes them unchanged: ids, and labels only where something is learnt.
    data = [
        packed_rows(examples, rows.limit)
        if settings.packing
        else Dataset.from_dict(
            {
                "input_ids": [example.input_ids for example in examples],
                "labels": [expected_labels(example) for example in examples],
            }
        )
        for examples in (rows.train, rows.validation)
    ]
    trainer = (kind if loss is None else OwnLossTrainer)(
        model=model,
        args=_arguments(settings, runtime, output, bool(rows.validation)),
        data_collator=PackedCollator(rows.pad_token_id) if settings.packing else None,
        train_dataset=data[0],
        eval_dataset=data[1] if rows.validation else None,
        processing_class=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        peft_config=peft_config(settings),
        callbacks=list(callbacks),
    )
    if loss is not None:
        trainer.own_loss = loss
    if settings.method == "qlora" and runtime.dtype == "float16":
        learn_in_float32(trainer.model)
    trainer.remove_callback(PrinterCallback)
    if hasattr(trainer.model, "create_or_update_model_card"):  # peft's, in save_pretrained
        trainer.model.create_or_update_model_card = lambda _folder: None
    return trainer


def audit_trainer(trainer: Trainer, rows: Sequence[Row], chat: ChatFormat) -> Report:
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
        # Rows come encoded and checked: nothing must be truncated, packed or rewritten.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not smoothed away
        save_strategy="no",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        # Keeping every score of the vocabulary is what fills a GPU in the evaluation step.
        prediction_loss_only=True,
        ddp_backend="gloo" if several and runtime.device == "cpu" else None,
        ddp_find_unused_parameters=False if several else None,
        report_to=[],  # our own callbacks do, see callbacks.py
        disable_tqdm=True,
    )
