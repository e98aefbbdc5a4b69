"""Fine-tunes the base model on the prepared chats: LoRA or all weights, answers only.

Reads run/data/train.jsonl and replay.jsonl and the base model; writes run/adapter, run/model
and run/finetune/loss.jsonl.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import torch

from ..errors import StageError
from ..prompt import ChatFormat, Example
from ..recipe import Recipe
from ..run import Run
from .merge import merge, write_adapter
from .rows import encode_rows, read_rows, with_casual_copies
from .runtime import Runtime, choose_runtime, quiet_libraries, torch_threads
from .teach import Progress
from .trainer import LossLog, make_trainer
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
    examples, counts = _examples(recipe, run, chat)
    runtime = choose_runtime(recipe, count_weights(folder))
    _check_one_gpu()
    with torch_threads(runtime.threads):
        model = load_model(folder, _load_dtype(recipe, runtime), recipe.model.attn_implementation)
        log = LossLog(run.file("finetune", "loss.jsonl"), progress)
        trainer = _trained(model, folder, examples, recipe, runtime, log)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        figures = _figures(trained, examples, log, recipe.finetune.num_train_epochs)
        if recipe.finetune.method == "lora":
            write_adapter(trained, run.path / "adapter")
        merge(trained, chat, run.path / "model", folder, runtime.torch_dtype)
    del model, trainer, trained
    _free_gpu_memory()
    return {
        "path": "model",
        "adapter": "adapter" if recipe.finetune.method == "lora" else None,
        "summary": f"{recipe.finetune.method}, {figures['trained_parameters'] / 1e6:.2f} M of "
        f"{figures['parameters'] / 1e6:.2f} M weights, final loss {figures['final_loss']:.3f}",
        "loss_log": "finetune/loss.jsonl",
        "conversations": counts,
        **figures,
        "settings": {
            **recipe.finetune.model_dump(mode="json"),
            "device": runtime.device,
            "dtype": runtime.dtype,
            "num_threads": runtime.threads,
        },
        "choices": list(runtime.choices),
    }


def _examples(recipe: Recipe, run: Run, chat: ChatFormat) -> tuple[list[Example], dict[str, int]]:
    """The new chats, their casual copies, and the old chats that are replayed."""
    train = read_rows([run.path / "data" / "train.jsonl"])
    replay_file = run.path / "data" / "replay.jsonl"
    replay = read_rows([replay_file] if replay_file.is_file() else [])
    rows = with_casual_copies(train) if recipe.data.casual_copies else train
    limit = min(recipe.data.max_length, chat.context_length)
    examples = encode_rows(chat, rows, limit, "data.train")
    if replay:
        examples += encode_rows(chat, replay, limit, "data.replay")
    return examples, {
        "train": len(train),
        "casual_copies": len(rows) - len(train),
        "replay": len(replay),
    }


def _load_dtype(recipe: Recipe, runtime: Runtime) -> torch.dtype:
    """LoRA leaves the weights as they are; when all learn, small steps need all of float32."""
    return torch.float32 if recipe.finetune.method == "full" else runtime.torch_dtype


def _free_gpu_memory() -> None:
    """Evaluation loads two more models in this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_one_gpu() -> None:
    if torch.cuda.device_count() > 1:
        raise StageError(
            f"{torch.cuda.device_count()} GPUs are visible; fine-tuning uses one. "
            "Name it: CUDA_VISIBLE_DEVICES=0 phi3 up …"
        )


def _trained(
    model: Any,
    folder: Path,
    examples: list[Example],
    recipe: Recipe,
    runtime: Runtime,
    log: LossLog,
) -> Any:
    try:
        trainer = make_trainer(model, folder, examples, recipe.finetune, runtime, log)
    except ValueError as error:
        raise StageError(
            f"The settings of finetune: do not fit the model: {str(error).splitlines()[0]} "
            "Check finetune.target_modules (all-linear always fits)."
        ) from None
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
    return trainer


def _figures(model: Any, examples: list[Example], log: LossLog, epochs: int) -> dict[str, Any]:
    last = log.losses[-max(1, len(log.losses) // epochs) :]
    weights = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "trained_parameters": sum(w.numel() for w in weights if w.requires_grad),
        "tokens": sum(len(example.input_ids) for example in examples),
        "learnt_tokens": sum(sum(example.assistant_mask) for example in examples),
        "steps": len(log.losses),
        "first_loss": round(log.losses[0], 5),
        "final_loss": round(sum(last) / len(last), 5),  # mean of the last epoch
    }
