"""The terms of the memory prediction: each grows with what it should, and with nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from phi3_training.memory.inference import evaluate_phase, save_phase, serve_phase, served_weights
from phi3_training.memory.model import GIB, KNOWN, of_size, ram, shape_from
from phi3_training.memory.training import (
    Work,
    activation_bytes,
    gradient_bytes,
    layer_bytes,
    loss_bytes,
    optimiser_bytes,
    step_phase,
    weight_bytes,
)

MINI = shape_from(KNOWN["microsoft/Phi-3-mini-4k-instruct"], "table")
SMALL = shape_from(
    {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
     "num_attention_heads": 4}, "made up",
)  # fmt: skip
CPU = Work(method="lora", device="cpu", compute=4, batch=2, accumulation=1, tokens=128)
GPU = replace(CPU, device="cuda", compute=2)


def test_full_training_holds_sixteen_bytes_a_weight() -> None:
    work = replace(GPU, method="full")
    fixed = weight_bytes(MINI, work) + gradient_bytes(MINI, work) + optimiser_bytes(MINI, work)
    assert fixed == 16 * MINI.parameters


def test_phi3_mini_by_hand() -> None:
    """32 layers, hidden 3072, MLP 8192, 32064 words: figures that can be worked out on paper."""
    layer = 3072 * 9216 + 3072 * 3072 + 3072 * 16384 + 8192 * 3072
    words_and_norms = 2 * 32064 * 3072 + 65 * 3072
    assert MINI.parameters == 32 * layer + words_and_norms == 3_821_079_552
    assert weight_bytes(MINI, GPU) == 7_642_159_104  # the published files: 7.64 GB
    # r = 16 beside all matrices: the 25.2 M that peft reports for this model
    assert gradient_bytes(MINI, replace(GPU, lora_r=16)) == 4 * 25_165_824
    assert optimiser_bytes(MINI, replace(GPU, lora_r=16)) == 8 * 25_165_824
    # transformers' get_memory_footprint() of the 4-bit model is 2206.347264 MB: with 6,144 bytes
    # of rotary tables, and without the constants of each block of 64 weights
    constants = 32 * layer * (1 / 64 + 4 / (64 * 256))
    four = weight_bytes(MINI, replace(GPU, method="qlora"))
    assert four == 2_206_347_264 - 6_144 + constants
    assert MINI.kv_per_token * 2 == 393_216  # so 4,096 tokens of one conversation take 1.5 GiB


def test_phi3_mini_activations_by_hand() -> None:
    """One row of 2,048 tokens, bf16 LoRA: what each token keeps of a layer.

    h = 3072, i = 8192; in two bytes: both norms' outputs 2h, qkv 3h, rotated q and k 2h,
    attention's output h, and 4i of the MLP; in four: both norms' inputs; and r for each matrix.
    """
    work = replace(GPU, batch=1, tokens=2048, lora_r=16)
    token = 2 * (8 * 3072 + 4 * 8192 + 4 * 16) + 4 * 2 * 3072
    assert layer_bytes(MINI, work) == 2048 * token
    ends = 2048 * 3072 * 8
    assert activation_bytes(MINI, work) == 32 * 2048 * token + ends
    kept = replace(work, checkpointing=True)
    assert activation_bytes(MINI, kept) == 32 * 2048 * 3072 * 2 + ends


def test_float16_needs_adapters_of_float32() -> None:
    half, full = (replace(GPU, method="qlora", float16=n) for n in (False, True))
    assert gradient_bytes(MINI, full) == 2 * gradient_bytes(MINI, half)


def test_lora_learns_r_times_both_sides_and_dora_the_lengths_as_well() -> None:
    sides = 128 + 384 + 128 + 128 + 128 + 512 + 256 + 128
    assert gradient_bytes(SMALL, replace(CPU, lora_r=8)) == 2 * 8 * sides * 4
    lengths = 384 + 128 + 512 + 128
    dora = gradient_bytes(SMALL, replace(CPU, lora_r=8, method="dora"))
    assert dora == 2 * (8 * sides + lengths) * 4
    some = replace(CPU, lora_r=8, target_modules=("o_proj",))
    assert gradient_bytes(SMALL, some) == 2 * 8 * (128 + 128) * 4


def test_four_bits_spare_three_quarters_of_the_matrices_only() -> None:
    half, four = weight_bytes(MINI, GPU), weight_bytes(MINI, replace(GPU, method="qlora"))
    kept = 2 * MINI.other_weights
    assert (four - kept) / (half - kept) == pytest.approx(0.25, abs=0.01)
    assert four > kept


def test_layer_by_hand() -> None:
    """float32 LoRA, per token: both norms in and out, qkv, rotated q and k, output, 4 of MLP."""
    numbers = 4 * 128 + 3 * 128 + 128 + 128 + 128 + 4 * 256
    adapter = 4 * CPU.lora_r
    assert layer_bytes(SMALL, CPU) == 256 * 4 * (numbers + adapter)
    full = 256 * 4 * (numbers + 2 * 128)
    assert layer_bytes(SMALL, replace(CPU, method="full")) == full


def test_untouched_matrices_keep_no_input() -> None:
    only_down = replace(CPU, target_modules=("down_proj",), lora_r=1)
    everything = replace(CPU, lora_r=1)
    assert layer_bytes(SMALL, everything) - layer_bytes(SMALL, only_down) == 256 * 4 * (2 * 128 + 3)


def test_checkpointing_keeps_inputs_only() -> None:
    kept = replace(CPU, checkpointing=True)
    ends = activation_bytes(SMALL, kept) - 2 * 256 * 128 * 4
    assert ends == 256 * 128 * 8
    assert step_phase(MINI, kept).total < step_phase(MINI, CPU).total


def test_eager_attention_grows_with_the_square() -> None:
    def extra(tokens: int) -> int:
        eager = replace(CPU, attention="eager", tokens=tokens)
        return layer_bytes(SMALL, eager) - layer_bytes(SMALL, replace(CPU, tokens=tokens))

    assert extra(128) == 2 * 4 * 128**2 * 4
    assert extra(256) == 4 * extra(128)


def test_vocabulary_dominates_a_small_model() -> None:
    assert loss_bytes(SMALL, CPU) > activation_bytes(SMALL, CPU)
    assert loss_bytes(SMALL, replace(CPU, learnt=0.5)) == loss_bytes(SMALL, CPU) / 2
    assert loss_bytes(SMALL, replace(CPU, own_loss=True)) > loss_bytes(SMALL, CPU)


def test_tiles_bound_the_loss_on_a_gpu() -> None:
    long = replace(GPU, tokens=8192)
    assert loss_bytes(MINI, long) < long.positions * MINI.vocab * 2


def test_accumulated_gradients_meet_the_activations() -> None:
    once, twice = (replace(CPU, method="full", accumulation=n) for n in (1, 2))
    long = replace(once, tokens=4096), replace(twice, tokens=4096)
    more = step_phase(MINI, long[1]).total - step_phase(MINI, long[0]).total
    assert more == gradient_bytes(MINI, once)


def test_heap_is_counted_where_it_is_wasted() -> None:
    assert step_phase(SMALL, CPU).parts["heap"] > 0
    assert "heap" not in step_phase(SMALL, replace(CPU, device="cuda")).parts
    assert "heap" not in evaluate_phase(SMALL, GPU, at_once=4, new_tokens=8).parts


def test_saving_dora_keeps_the_unmerged_matrices() -> None:
    more = save_phase(MINI, replace(GPU, method="dora")).total - save_phase(MINI, GPU).total
    assert more >= 2 * MINI.linear_weights


def test_evaluation_holds_the_cache_of_all_answers() -> None:
    few, many = (evaluate_phase(MINI, GPU, at_once=n, new_tokens=64) for n in (64, 128))
    token = 2 * 32 * 3072 * 2  # key and value, layers, hidden, bytes
    assert many.parts["key/value cache"] == 128 * (128 + 64) * token
    assert many.parts["key/value cache"] == 2 * few.parts["key/value cache"]


def test_evaluation_of_a_large_vocabulary_is_its_scores() -> None:
    phase = evaluate_phase(SMALL, CPU, at_once=1, new_tokens=1)
    assert phase.parts["vocabulary scores"] == 4096 * 2048 * (4 + 4 + 4)


def test_serving_by_precision() -> None:
    full = served_weights(MINI, "fp32", "onnxruntime", 4)
    four = served_weights(MINI, "int4", "onnxruntime", 4)
    assert full == 4 * MINI.parameters
    assert 2.5e9 < four < 3.0e9  # the published int4 CPU file has 2.7 GB
    eight = served_weights(MINI, "int8", "onnxruntime", 4)
    assert eight == pytest.approx(MINI.parameters, rel=0.01)  # norms apart
    served = serve_phase(MINI, "int4", "onnxruntime", 4, 100)
    assert served.parts["key/value cache"] == 100 * MINI.kv_per_token * 4


def test_a_tied_matrix_is_served_twice_and_never_as_a_float_embedding() -> None:
    tied = shape_from(KNOWN["microsoft/Phi-4-mini-instruct"], "table")
    matrix = tied.vocab * tied.hidden
    assert served_weights(tied, "fp32", "onnxruntime", 4) == 4 * (tied.parameters + matrix)
    untied = replace(tied, tied=False)
    four = served_weights(tied, "int4", "onnxruntime", 4)
    assert 2.5e9 < four < served_weights(untied, "int4", "onnxruntime", 4) - 1.5e9
    assert served_weights(tied, "int4", "transformers", 2) == 2 * tied.parameters


def test_ram_of_a_container_is_its_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{GIB // 4}\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 8}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 16}\n")
    total, available = ram(tmp_path)
    assert total == GIB // 4
    assert available <= GIB // 4 - GIB // 16


@pytest.mark.parametrize("limit", ["max\n", None])
def test_no_limit_means_the_machine(tmp_path: Path, limit: str | None) -> None:
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    assert ram(tmp_path)[0] > GIB // 4


def test_planned_device_is_all_free() -> None:
    device = of_size(24)
    assert (device.kind, device.total, device.available) == ("cuda", 24 * GIB, 24 * GIB)


DENSE = replace(CPU, compute=2, dense=True, merged=4)


def test_dense_layer_by_hand() -> None:
    """bf16 base on a CPU: norms and attention float32, products half; h = q = 128, i = 256."""
    half = 2 * 128 + 128 + 2 * 256 + 256 + 4 * CPU.lora_r
    whole = 2 * 128 + 2 * 128 + 2 * 128
    assert layer_bytes(SMALL, DENSE) == 256 * (2 * half + 4 * whole)
    only_down = replace(DENSE, target_modules=("down_proj",))
    spared = 2 * (2 * 128 + 128 + 3 * CPU.lora_r)
    assert layer_bytes(SMALL, DENSE) - layer_bytes(SMALL, only_down) == 256 * spared
    assert layer_bytes(SMALL, replace(DENSE, packing=True)) == layer_bytes(SMALL, DENSE)


def test_dense_loss_does_not_grow_with_the_vocabulary_of_every_row() -> None:
    pieces = 128 * SMALL.vocab * 8
    assert loss_bytes(SMALL, DENSE) == pieces + 256 * 128 * 8
    more = loss_bytes(SMALL, replace(DENSE, tokens=256)) - loss_bytes(SMALL, DENSE)
    assert more == 256 * 128 * 8


def test_rounded_base_is_half_and_merged_into_whole_weights_beside_it() -> None:
    assert weight_bytes(MINI, DENSE) == 2 * MINI.parameters
    assert gradient_bytes(MINI, DENSE) == gradient_bytes(MINI, CPU)  # the adapter is float32
    assert save_phase(MINI, DENSE).parts["weights"] == 6 * MINI.parameters
    qlora = replace(GPU, method="qlora", merged=2)
    assert save_phase(MINI, qlora).parts["weights"] == 2 * MINI.parameters
