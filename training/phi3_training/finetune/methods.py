"""The ways to fine-tune: what of the model learns, how it is loaded for that, and how merged.

Reads model folders; writes nothing.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ..errors import MissingExtraError, StageError
from ..recipe import FinetuneSection, Recipe
from .runtime import Runtime
from .weights import load_model


def check_method(settings: FinetuneSection, device: str) -> None:
    """Raise StageError or MissingExtraError when this machine cannot train that way."""
    if settings.method != "qlora":
        return
    if device != "cuda":
        raise StageError(
            "finetune.method qlora needs a CUDA GPU (bitsandbytes computes with 4-bit weights "
            f"there); this machine trains on: {device}. Set finetune.method=lora, which gives the "
            "same adapter for about four times the memory of the weights."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "qlora")


def peft_config(settings: FinetuneSection) -> LoraConfig | None:
    """What is put beside the weights; None when the weights themselves learn."""
    if settings.method == "full":
        return None
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        use_dora=settings.method == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )


def load_for_training(folder: Path, recipe: Recipe, runtime: Runtime) -> Any:
    """The base model as the method needs it.

    LoRA leaves the weights as they are; when all learn, small steps need all of float32.
    """
    attention = recipe.model.attn_implementation
    if recipe.finetune.method == "full":
        return load_model(folder, torch.float32, attention)
    if recipe.finetune.method != "qlora":
        return load_model(folder, runtime.torch_frozen, attention)
    options = four_bit(runtime.torch_dtype, runtime.device)
    return load_model(folder, runtime.torch_dtype, attention, **options)


def learn_in_float32(model: Any) -> None:
    """Give what learns all of float32.

    TRL makes a QLoRA adapter bfloat16, whose gradients cannot be scaled on a GPU that has only
    float16 (such as a T4).
    """
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def four_bit(dtype: torch.dtype, device: str) -> dict[str, Any]:
    """How transformers loads weights as 4-bit normal floats, computing in `dtype`.

    The rest of what QLoRA needs is TRL's: frozen weights, an adapter of bfloat16, and inputs that
    carry gradients to checkpointed layers. peft's prepare_model_for_kbit_training is not called:
    it would make embedding, norms and output matrix float32, which autocast and the norms' own
    arithmetic have made needless (0.4 GB of Phi-3-mini).
    """
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # 4-bit weights cannot be moved later: they go at once to the GPU of this process.
    return {
        "quantization_config": quantized,
        "device_map": {"": _own_gpu() if device == "cuda" else device},
    }


def _own_gpu() -> int:
    """The number that torchrun and accelerate give to each process of a machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def with_adapter(folder: Path, adapter: Path, dtype: torch.dtype) -> Any:
    """The base model of full precision with a trained adapter: what is merged and served.

    A QLoRA adapter is merged into these weights too: merging into rounded ones would round the
    adapter as well.
    """
    model = load_model(folder, dtype)
    return PeftModel.from_pretrained(model, adapter, local_files_only=True)
