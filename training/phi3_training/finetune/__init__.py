"""Makes the base model, fine-tunes it on the prepared chats and merges the result.

Reads run/data/*.jsonl; writes run/base, run/adapter, run/model and run/finetune/loss.jsonl.
torch is imported inside the functions only, so that the package itself is cheap to import.
"""

from __future__ import annotations

import logging

from ..errors import StageError
from ..manifests import BaseManifest, ModelManifest
from ..progress import Progress, no_progress
from ..recipe import Recipe
from ..run import Run
from .runtime import import_torch_without_spinning

# On a CPU with avx512_bf16 it misses a package that nothing here uses, and says so when peft
# imports it: before any module of this package could.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def prepare_base(recipe: Recipe, run: Run, progress: Progress = no_progress) -> BaseManifest:
    """Make the tiny Phi-3, or find the weights that the recipe names; the manifest `base`."""
    import_torch_without_spinning()
    from . import base

    return base.prepare_base(recipe, run, progress)


def finetune(recipe: Recipe, run: Run, progress: Progress = no_progress) -> ModelManifest:
    """Fine-tune the base model on the prepared chats; the manifest `model`."""
    import_torch_without_spinning()
    if recipe.finetune.num_processes > 1:
        from . import launch

        return launch.finetune(recipe, run, progress)
    from . import sft

    manifest = sft.finetune(recipe, run, progress)
    if manifest is None:
        raise StageError("RANK is set, as in a process of torchrun; unset it: unset RANK")
    return manifest
