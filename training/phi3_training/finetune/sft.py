"""Fine-tunes the base model on the prepared chats: answers only, by the recipe's method.

Reads run/data/*.jsonl and the base model; writes run/adapter (or run/adapters/NAME), run/model
and run/finetune/loss.jsonl.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import torch
from transformers import PreTrainedModel
from trl import SFTTrainer

from ..errors import StageError
from ..manifests import BaseManifest, ModelManifest
from ..models.layers import matrices, targets_in
from ..progress import Progress, note
from ..prompt import ChatFormat
from ..recipe import FinetuneSection, Recipe
from ..run import Run
from .callbacks import Checkpoints, LossLog, TrimHeap, Validation, trackers
from .rows import TrainingRows
from .runtime import Runtime, choose_runtime, is_main_process, quiet_libraries, torch_threads
from .trainer import Rows, audit_trainer, make_trainer
from .weights import (
    AdapterNotes,
    adapter_folder,
    base_folder,
    chat_format,
    check_method,
    count_weights,
    load_for_training,
    merge,
    model_type,
    scale_adapter,
    with_adapter,
    write_adapter,
)


def finetune(recipe: Recipe, run: Run, progress: Progress) -> ModelManifest | None:
    """Train, merge and save; the manifest with its `path`.

    None in all but the main one of several processes. Raises StageError when the chats cannot be
    learnt from as they are, when memory runs out, or when the loss is NaN or infinite.
    """
    quiet_libraries()
    note(progress, "reading chats and weights")
    folder = base_folder(run)
    chat = chat_format(folder)
    runtime = choose_runtime(recipe, count_weights(folder), model_type(folder))
    check_method(recipe.finetune, runtime.device)
    try:
        targets = targets_in(recipe.finetune.target_modules, matrices(folder))
    except ValueError as error:
        raise StageError(f"The settings of finetune: do not fit the model: {error}") from None
    own_names = recipe.finetune.model_copy(update={"target_modules": targets.names})
    recipe = recipe.model_copy(update={"finetune": own_names})
    rows = TrainingRows.of(recipe, run, chat)
    with torch_threads(runtime.threads):
        model = load_for_training(folder, recipe, runtime)
        log = LossLog(run.file("finetune", "loss.jsonl"), progress)
        watch = Validation(run.path / "finetune", recipe.finetune.early_stopping_patience)
        data = Rows(
            [row.example for row in rows.train],
            [row.example for row in rows.held_out],
            rows.limit,
            chat.pad_token_id,
        )
        saves = Checkpoints(run.path, recipe.finetune, runtime, data, folder)
        callbacks = [
            log,
            *([watch] if rows.held_out else []),
            saves,
            *trackers(recipe, run, saves.folder),
            *([TrimHeap()] if runtime.device == "cpu" else []),
        ]
        try:
            trainer = make_trainer(
                model, folder, data, recipe.finetune, runtime, callbacks, saves.folder
            )
        except ValueError as error:
            raise StageError(
                f"The settings of finetune: do not fit the model: {str(error).splitlines()[0]} "
                "Check finetune.target_modules (all-linear always fits)."
            ) from None
        # Again, on what the trainer made of the rows: libraries have truncated and unmasked them.
        audit_trainer(trainer, rows.train, chat).refuse(rows.allow)
        _learn(trainer, saves.newest(), log, recipe.finetune)
        trained = trainer.accelerator.unwrap_model(trainer.model)
        if not is_main_process():
            return None
        restored = watch.restore(trained)
        watch.clear()
        # By the schedule: a training that stopped early has fewer epochs than the recipe says.
        epoch = trainer.state.max_steps // recipe.finetune.num_train_epochs
        last = log.losses[-max(1, epoch) :]
        # No list of the weights: it would keep the model in memory after `del` below.
        # bitsandbytes packs two weights of 4 bits into a byte.
        parameters = sum(w.numel() * (1 + (w.dtype == torch.uint8)) for w in trained.parameters())
        trained_parameters = sum(w.numel() for w in trained.parameters() if w.requires_grad)
        final_loss = round(sum(last) / len(last), 5)  # mean of the last epoch
        _save(trained, recipe, run, chat, runtime, final_loss)
        saves.clear()
    del model, trainer, trained
    gc.collect()
    if torch.cuda.is_available():  # evaluation loads two more models in this process
        torch.cuda.empty_cache()
    settings = recipe.finetune
    named = f" as adapter {settings.adapter}" if settings.adapter else ""
    adapter = f"adapters/{settings.adapter}" if settings.adapter else "adapter"
    manifest = ModelManifest(
        path="model",
        adapter=None if settings.method == "full" else adapter,
        summary=f"{settings.method}{named}, {trained_parameters / 1e6:.2f} M of "
        f"{parameters / 1e6:.2f} M weights, final loss {final_loss:.3f}",
        loss_log="finetune/loss.jsonl",
        conversations=rows.counts,
        audit=rows.report.manifest(settings.allow),
        parameters=parameters,
        trained_parameters=trained_parameters,
        tokens=sum(len(row.example.input_ids) for row in rows.train),
        learnt_tokens=sum(sum(row.example.assistant_mask) for row in rows.train),
        steps=len(log.losses),
        first_loss=round(log.losses[0], 5),
        final_loss=final_loss,
        settings={
            **settings.model_dump(mode="json"),
            **runtime.as_dict(),
        },
        choices=[
            *(targets.choices if settings.method != "full" else []),
            *runtime.choices,
            *saves.choices(),
            *rows.skipped,
            *rows.report.choices(),
            *([restored] if restored else []),
        ],
    )
    if watch.best is None:
        return manifest
    return manifest.model_copy(update={"validation_loss": round(watch.best[1], 5)})


def _learn(
    trainer: SFTTrainer, checkpoint: Path | None, log: LossLog, settings: FinetuneSection
) -> None:
    """The training itself, from a checkpoint if there is one; StageError for what ends it."""
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except torch.OutOfMemoryError:
        raise StageError(
            "The GPU ran out of memory. Lower finetune.per_device_train_batch_size (and raise "
            "finetune.gradient_accumulation_steps by the same factor), or set "
            "finetune.gradient_checkpointing=true, or finetune.method=qlora, or lower "
            "data.max_length."
        ) from None
    if not log.losses or not math.isfinite(log.losses[-1]):
        raise StageError(
            "The loss became NaN or infinite, so nothing was saved. Lower "
            f"finetune.learning_rate (now {settings.learning_rate}); "
            f"the loss of each step: {log.path}"
        )


def _save(
    model: PreTrainedModel,
    recipe: Recipe,
    run: Run,
    chat: ChatFormat,
    runtime: Runtime,
    final_loss: float,
) -> None:
    """Write the adapter, if there is one, and the full model."""
    settings = recipe.finetune
    base = base_folder(run)
    if settings.method != "full":
        target = adapter_folder(run, settings.adapter)
        scale_adapter(model, settings.adapter_weight)
        notes: AdapterNotes = {
            "method": settings.method,
            "base_id": run.require(BaseManifest).done_id,
            "dtype": runtime.dtype,
            "final_loss": final_loss,
        }
        write_adapter(model, target, notes)
        # Merged into the full-precision weights, not into those it was trained on.
        if settings.method == "qlora" or runtime.frozen != runtime.dtype:
            if runtime.frozen != runtime.dtype:
                model.to("meta")  # frees the rounded weights before the exact ones are loaded
            model = with_adapter(base, target, runtime.torch_dtype)
    merge(model, chat, run.path / "model", base, runtime.torch_dtype)
