"""Fine-tunes the base model on the prepared chats: answers only, by the recipe's method.

Reads run/data/*.jsonl and the base model; writes run/adapter (or run/adapters/NAME), run/model
and run/finetune/loss.jsonl.
"""

from __future__ import annotations

import gc
import math

import torch
from transformers import PreTrainedModel

from ..errors import StageError, first_line
from ..manifests import BaseManifest, ModelManifest
from ..models.layers import matrices, targets_in
from ..progress import Progress, note
from ..recipe import Recipe
from ..run import Run
from .callbacks import Checkpoints, LossLog, TrimHeap, Validation, trackers
from .rows import TrainingRows
from .runtime import choose_runtime, is_main_process, quiet_libraries, torch_threads
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
    training = Training(recipe, run, progress)
    with torch_threads(training.runtime.threads):
        model = training.learn()
        if model is None:
            return None
        training.save(model)
    del model
    gc.collect()  # trainer and model refer to each other
    if torch.cuda.is_available():  # evaluation loads two more models in this process
        torch.cuda.empty_cache()
    return training.manifest()


class Training:
    """One fine-tuning: everything is decided and every row is audited before weights are loaded."""

    def __init__(self, recipe: Recipe, run: Run, progress: Progress) -> None:
        self._run, self._base = run, base_folder(run)
        self._chat = chat_format(self._base)
        weights, kind = count_weights(self._base), model_type(self._base)
        self.runtime = choose_runtime(recipe, weights, kind)
        check_method(recipe.finetune, self.runtime.device)
        try:
            targets = targets_in(recipe.finetune.target_modules, matrices(self._base))
        except ValueError as error:
            raise StageError(f"The settings of finetune: do not fit the model: {error}") from None
        # Names of other models' layers are taken for this one's, and said so.
        self._choices = targets.choices if recipe.finetune.method != "full" else []
        self._settings = recipe.finetune.model_copy(update={"target_modules": targets.names})
        self._recipe = recipe.model_copy(update={"finetune": self._settings})
        self._rows = TrainingRows.of(self._recipe, run, self._chat)
        self._log = LossLog(run.file("finetune", "loss.jsonl"), progress)
        patience = self._settings.early_stopping_patience
        self._watch = Validation(run.path / "finetune", patience)

    def learn(self) -> PreTrainedModel | None:
        """Train from the newest checkpoint on; None in a process that is not the main one."""
        rows, settings, runtime, log = self._rows, self._settings, self.runtime, self._log
        model = load_for_training(self._base, self._recipe, runtime)
        data = Rows(
            [row.example for row in rows.train],
            [row.example for row in rows.held_out],
            rows.limit,
            self._chat.pad_token_id,
        )
        self._saves = saves = Checkpoints(self._run.path, settings, runtime, data, self._base)
        callbacks = [
            log,
            *([self._watch] if rows.held_out else []),
            saves,
            *trackers(self._recipe, self._run, saves.folder),
            *([TrimHeap()] if runtime.device == "cpu" else []),
        ]
        try:
            trainer = make_trainer(
                model, self._base, data, settings, runtime, callbacks, saves.folder
            )
        except ValueError as error:
            raise StageError(
                f"The settings of finetune: do not fit the model: {first_line(error)} "
                "Check finetune.target_modules (all-linear always fits)."
            ) from None
        # Again, on what the trainer made of the rows: libraries have truncated and unmasked them.
        audit_trainer(trainer, rows.train, self._chat).refuse(rows.allow)
        checkpoint = saves.newest()
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
        trained = trainer.accelerator.unwrap_model(trainer.model)
        # By the schedule: a training that stopped early has fewer epochs than the recipe says.
        epoch = max(1, trainer.state.max_steps // settings.num_train_epochs)
        last = log.losses[-epoch:]
        self._final_loss = round(sum(last) / len(last), 5)  # mean of the last epoch
        return trained if is_main_process() else None

    def save(self, model: PreTrainedModel) -> None:
        """Write the adapter, if there is one, and the full model; then no checkpoint is needed."""
        settings, runtime = self._settings, self.runtime
        self._restored = self._watch.restore(model)
        self._watch.clear()
        # bitsandbytes packs two weights of 4 bits into a byte.
        self._weights = sum(w.numel() * (1 + (w.dtype == torch.uint8)) for w in model.parameters())
        self._learnt_weights = sum(w.numel() for w in model.parameters() if w.requires_grad)
        if settings.method != "full":
            target = adapter_folder(self._run, settings.adapter)
            scale_adapter(model, settings.adapter_weight)
            notes: AdapterNotes = {
                "method": settings.method,
                "base_id": self._run.require(BaseManifest).done_id,
                "dtype": runtime.dtype,
                "final_loss": self._final_loss,
            }
            write_adapter(model, target, notes)
            # Merged into the full-precision weights, not into those it was trained on.
            if settings.method == "qlora" or runtime.frozen != runtime.dtype:
                if runtime.frozen != runtime.dtype:
                    model.to("meta")  # frees the rounded weights before the exact ones are loaded
                model = with_adapter(self._base, target, runtime.torch_dtype)
        merge(model, self._chat, self._run.path / "model", self._base, runtime.torch_dtype)
        self._saves.clear()

    def manifest(self) -> ModelManifest:
        """What was learnt from what, and how it went."""
        settings, rows, losses = self._settings, self._rows, self._log.losses
        named = f" as adapter {settings.adapter}" if settings.adapter else ""
        adapter = f"adapters/{settings.adapter}" if settings.adapter else "adapter"
        manifest = ModelManifest(
            path="model",
            adapter=None if settings.method == "full" else adapter,
            summary=f"{settings.method}{named}, {self._learnt_weights / 1e6:.2f} M of "
            f"{self._weights / 1e6:.2f} M weights, final loss {self._final_loss:.3f}",
            loss_log="finetune/loss.jsonl",
            conversations=rows.counts,
            audit=rows.report.manifest(settings.allow),
            parameters=self._weights,
            trained_parameters=self._learnt_weights,
            tokens=sum(len(row.example.input_ids) for row in rows.train),
            learnt_tokens=sum(sum(row.example.assistant_mask) for row in rows.train),
            steps=len(losses),
            first_loss=round(losses[0], 5),
            final_loss=self._final_loss,
            settings={**settings.model_dump(mode="json"), **self.runtime.as_dict()},
            choices=[
                *self._choices,
                *self.runtime.choices,
                *self._saves.choices(),
                *rows.skipped,
                *rows.report.choices(),
                *([self._restored] if self._restored else []),
            ],
        )
        best = self._watch.best
        if best is None:
            return manifest
        return manifest.model_copy(update={"validation_loss": round(best[1], 5)})
