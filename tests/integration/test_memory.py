"""The memory plan against a real model: numbers of weights, and a measured peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi3_training.memory.model import shape_from
from phi3_training.memory.training import Work, learning_weights

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks/memory_plan.py"
TOLERANCE = 0.2  # of the whole process; docs/memory.md states it
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("modules", ["all-linear", ["qkv_proj", "down_proj"], r".*\.mlp\..*_proj"])
def test_weights_are_counted_as_peft_makes_them(
    method: str, modules: str | list[str], tied: bool
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {**SIZES, "tie_word_embeddings": tied}
    model = Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0))
    shape = shape_from(sizes, "test")
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    config = LoraConfig(r=4, target_modules=modules, use_dora=method == "dora",
                        task_type="CAUSAL_LM")  # fmt: skip
    adapted = get_peft_model(model, config)
    chosen = modules if isinstance(modules, str) else tuple(modules)
    work = Work("lora" if method == "lora" else "dora", "cpu", 4, 1, 1, 8, lora_r=4,
                target_modules=chosen)  # fmt: skip
    learning = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    assert learning_weights(shape, work) == learning


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("case", ["mid lora + checkpointing", "mid evaluate"])
def test_prediction_is_near_the_measured_peak(case: str) -> None:
    command = [sys.executable, str(BENCHMARK), "--only", case, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (result,) = json.loads(done.stdout)
    for phase, (predicted, measured) in result["phases"].items():
        whole = measured + result["libraries"]
        assert predicted + result["overhead"] == pytest.approx(whole, rel=TOLERANCE), phase
        assert measured > 100 * 2**20, "too little is measured to tell anything"
