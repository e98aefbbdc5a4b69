"""Fine-tunes the base model on the prepared chats: LoRA or all weights, answers only.

Reads run/data/train.jsonl and replay.jsonl and the base model; writes run/adapter, run/model
and run/finetune/loss.jsonl.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..errors import StageError
from ..prompt import ChatFormat, Example
from ..recipe import Recipe
from ..run import Run
from .audit import Report, Row, audit
from .merge import merge, write_adapter
from .rows import audited, encode_rows, read_located, with_casual_copies
from .runtime import Runtime, choose_runtime, quiet_libraries, torch_threads
from .teach import Progress
from .trainer import LossLog, as_trained, make_trainer
from .weights import base_folder, chat_format, count_weights, load_model


def finetune(recipe: Recipe, run: Run, progress: Progress) -> dict[str, Any]:
    """Train, merge and save; the manifest `model` with its `path`.

    Raises StageError when the chats cannot be learnt from as they are, when memory does not
    suffice, or when the loss is no number any more.
    """
    quiet_libraries()
    progress(0, 0, "reading chats and weights")
    folder = base_folder(run)
    chat = chat_format(folder)
    rows, counts = _rows(recipe, run, chat)
    limit = min(recipe.data.max_length, chat.context_length)
    rows, examples, audit_report = audited(chat, rows, limit, recipe.finetune.allow)
    runtime = choose_runtime(recipe, count_weights(folder))
    _check_one_gpu()
    with torch_threads(runtime.threads):
        model = load_model(folder, _load_dtype(recipe, runtime), recipe.model.attn_implementation)
        log = LossLog(run.file("finetune", "loss.jsonl"), progress)
        trainer = _made(model, folder, examples, recipe, runtime, log)
        # Once more, on what the trainer made of the rows: libraries have cut and unmasked them.
        audit(rows, as_trained(trainer), chat).refuse(recipe.finetune.allow)
        _train(trainer, recipe, log)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        figures = _figures(trained, examples, log)
        if recipe.finetune.method == "lora":
            write_adapter(trained, run.path / "adapter")
        merge(trained, chat, run.path / "model", folder, runtime.torch_dtype)
    return {
        "path": "model",
        "adapter": "adapter" if recipe.finetune.method == "lora" else None,
        "summary": f"{recipe.finetune.method}, {figures['trained_parameters'] / 1e6:.2f} M of "
        f"{figures['parameters'] / 1e6:.2f} M weights, final loss {figures['final_loss']:.3f}",
        "loss_log": "finetune/loss.jsonl",
        "conversations": counts,
        "audit": audit_report.manifest(recipe.finetune.allow),
        **figures,
        "settings": {
            **recipe.finetune.model_dump(mode="json"),
            "device": runtime.device,
            "dtype": runtime.dtype,
            "num_threads": runtime.threads,
        },
        "choices": [*runtime.choices, *_audit_choices(audit_report)],
    }


def _rows(recipe: Recipe, run: Run, chat: ChatFormat) -> tuple[list[Row], dict[str, int]]:
    """The new chats, their casual copies, and the old chats that are replayed."""
    train = list(read_located(run.path / "data" / "train.jsonl", run.path))
    replay_file = run.path / "data" / "replay.jsonl"
    replay = list(read_located(replay_file, run.path)) if replay_file.is_file() else []
    rows = with_casual_copies(train) if recipe.data.casual_copies else train
    return encode_rows(chat, [*rows, *replay]), {
        "train": len(train),
        "casual_copies": len(rows) - len(train),
        "replay": len(replay),
    }


def _audit_choices(report: Report) -> list[str]:
    found = ", ".join(f"{count} × {rule}" for rule, count in report.counts().items())
    return [f"label audit: {found}, trained all the same as --allow says"] if found else []


def _load_dtype(recipe: Recipe, runtime: Runtime) -> torch.dtype:
    """LoRA leaves the weights as they are; when all learn, small steps need all of float32."""
    return torch.float32 if recipe.finetune.method == "full" else runtime.torch_dtype


def _check_one_gpu() -> None:
    if torch.cuda.device_count() > 1:
        raise StageError(
            f"{torch.cuda.device_count()} GPUs are visible; fine-tuning uses one. "
            "Name it: CUDA_VISIBLE_DEVICES=0 phi3 up …"
        )


def _made(
    model: Any,
    folder: Path,
    examples: list[Example],
    recipe: Recipe,
    runtime: Runtime,
    log: LossLog,
) -> Any:
    try:
        return make_trainer(model, folder, examples, recipe.finetune, runtime, log)
    except ValueError as error:
        raise StageError(
            f"The settings of finetune: do not fit the model: {str(error).splitlines()[0]} "
            "Check finetune.target_modules (all-linear always fits)."
        ) from None


def _train(trainer: Any, recipe: Recipe, log: LossLog) -> None:
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        raise StageError(
            "The GPU's memory does not suffice. Lower finetune.per_device_train_batch_size (and "
            "raise finetune.gradient_accumulation_steps as much), or set "
            "finetune.gradient_checkpointing=true, or lower data.max_length."
        ) from None
    if not log.losses or not math.isfinite(log.losses[-1]):
        raise StageError(
            "The loss is not a number any more, so nothing was saved. Lower "
            f"finetune.learning_rate (now {recipe.finetune.learning_rate}); "
            f"the loss of each step: {log.path}"
        )


def _figures(model: Any, examples: list[Example], log: LossLog) -> dict[str, Any]:
    weights = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "trained_parameters": sum(w.numel() for w in weights if w.requires_grad),
        "tokens": sum(len(example.input_ids) for example in examples),
        "learnt_tokens": sum(sum(example.assistant_mask) for example in examples),
        "steps": len(log.losses),
        "first_loss": round(log.losses[0], 5),
        "final_loss": round(log.losses[-1], 5),
    }
