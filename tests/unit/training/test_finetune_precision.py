"""In which numbers frozen weights are multiplied on a CPU: decided by recipe, model and CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_training.finetune.runtime import choose_precision
from phi3_training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parents[3] / "training/recipes/phi3-mini-lora.yaml"
AMX = frozenset({"amx_bf16", "avx512_bf16"})
REAL = 135_000_000


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides)


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16"])
def test_bfloat16_where_the_cpu_multiplies_it(flag: str) -> None:
    found = choose_precision(
        recipe(),
        "cpu",
        has_bfloat16=False,
        parameters=REAL,
        model_type="phi3",
        flags=frozenset({"fpu", flag}),
    )
    assert (found.dtype, found.frozen) == ("float32", "bfloat16")
    assert flag in (found.frozen_reason or "")


@pytest.mark.parametrize(
    ("overrides", "parameters", "model_type", "flags", "words"),
    [
        ([], REAL, "phi3", frozenset({"avx512f"}), "neither amx_bf16 nor avx512_bf16"),
        ([], 850_000, "phi3", AMX, "a model this small"),
        ([], REAL, "llama", AMX, "a Phi-3 with sdpa"),
        (["model.attn_implementation=eager"], REAL, "phi3", AMX, "a Phi-3 with sdpa"),
        (["model.dtype=float32"], REAL, "phi3", AMX, "as the recipe says"),
        (["finetune.method=dora"], REAL, "phi3", AMX, "only for LoRA in one process"),
        (["finetune.method=full"], REAL, "phi3", AMX, "only for LoRA in one process"),
        (["finetune.num_processes=2"], REAL, "phi3", AMX, "only for LoRA in one process"),
        (["finetune.loss=contrastive"], REAL, "phi3", AMX, "only for LoRA in one process"),
    ],
)
def test_float32_everywhere_else(
    overrides: list[str], parameters: int, model_type: str, flags: frozenset[str], words: str
) -> None:
    found = choose_precision(
        recipe(*overrides),
        "cpu",
        has_bfloat16=False,
        parameters=parameters,
        model_type=model_type,
        flags=flags,
    )
    assert (found.dtype, found.frozen) == ("float32", "float32")
    assert words in (found.frozen_reason or "")
