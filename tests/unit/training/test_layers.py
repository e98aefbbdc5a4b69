"""LoRA targets and adapters against a model's own matrices: all of it fits, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phi3_training.cli import main
from phi3_training.errors import StageError
from phi3_training.models.folder import check_rope
from phi3_training.models.layers import PHI3, check_adapter, matrices, matrices_of, targets_in

LLAMA = [
    f"model.layers.0.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip
TUTORIAL = ["q_proj", "k_proj", "v_proj", "o_proj"]
WEIGHTS = {
    "model.embed_tokens.weight": (50, 8),
    "model.layers.0.self_attn.qkv_proj.weight": (16, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_up_proj.weight": (24, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (50, 8),
}


def written(folder: Path, shapes: dict[str, tuple[int, ...]], name: str = "model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: np.ones(s, np.float32) for k, s in shapes.items()}, folder / f"{name}.safetensors"
    )
    return folder


def adapter(folder: Path, shapes: dict[str, tuple[int, ...]], **settings: Any) -> Path:
    written(folder, {f"base_model.model.{k}": s for k, s in shapes.items()}, "adapter_model")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def pair(module: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{module}.lora_A.weight": (2, inputs), f"{module}.lora_B.weight": (outputs, 2)}


ATTENTION = "model.layers.0.self_attn"
FITTING = {**pair(f"{ATTENTION}.qkv_proj", 8, 16), **pair(f"{ATTENTION}.o_proj", 8, 8)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return written(tmp_path / "base", WEIGHTS)


def test_what_every_llama_tutorial_says_trains_all_of_attention() -> None:
    found = targets_in(TUTORIAL, PHI3)
    assert found.names == ["qkv_proj", "o_proj"]
    assert "q_proj, k_proj, v_proj trained as qkv_proj" in found.choices[0]
    assert targets_in([*TUTORIAL, "gate_proj", "up_proj", "down_proj"], PHI3).names == [
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
    ]  # fmt: skip
    assert targets_in(["self_attn.q_proj"], PHI3).names == ["self_attn.qkv_proj"]


def test_fused_names_on_separate_matrices_are_all_of_them() -> None:
    assert targets_in(["qkv_proj", "o_proj"], LLAMA).names == TUTORIAL
    assert targets_in(TUTORIAL, LLAMA).choices == []


@pytest.mark.parametrize("wanted", ["all-linear", ["o_proj"], ".*_proj", r".*\.(o_proj|down_proj)"])
def test_what_fits_stays_as_it_is(wanted: str | list[str]) -> None:
    found = targets_in(wanted, PHI3)
    assert (found.names, found.choices) == (wanted, [])


def test_one_name_needs_no_list() -> None:
    assert targets_in("q_proj", PHI3).names == ["qkv_proj"]


@pytest.mark.parametrize(
    "wanted",
    [
        r".*\.(q_proj|o_proj)",
        ["o_proj", "query_key_value"],
        ["Wqkv"],
        [],
        ".*q_proj",
        "q_proj,v_proj",
        "(",
        ["proj"],
    ],
)
def test_what_matches_nothing_is_refused_with_the_names(wanted: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"finetune\.target_modules") as caught:
        targets_in(wanted, PHI3)
    assert "o_proj" in str(caught.value)


def test_names_of_a_folder_come_from_its_files(base: Path) -> None:
    assert f"{ATTENTION}.qkv_proj" in matrices(base)
    assert "model.norm" not in matrices(base)
    assert matrices_of(str(base)) == matrices(base)
    assert matrices_of("tiny") == matrices_of("microsoft/Phi-3.5-mini-instruct") == PHI3
    assert matrices_of("some/model-that-is-not-here") is None


def test_the_plan_refuses_names_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "training/recipes/phi3-tiny.yaml", "--runs", str(tmp_path)]
    assert main([*words, "finetune.target_modules=[o_proj, nonesuch]"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "no layer of this model is named nonesuch" in told
    assert "qkv_proj, o_proj, gate_up_proj, down_proj" in told
    assert main([*words, "finetune.target_modules=[q_proj, v_proj]"]) in (0, 1)
    assert "trained as qkv_proj" in " ".join(capsys.readouterr().err.split())


def test_an_adapter_of_the_base_fits(base: Path, tmp_path: Path) -> None:
    check_adapter(adapter(tmp_path / "a", FITTING), base)
    dora = {f"{ATTENTION}.o_proj.lora_magnitude_vector": (8,), **FITTING}
    check_adapter(adapter(tmp_path / "dora", dora, use_dora=True), base)
    kept = {"lm_head.weight": (50, 8), **FITTING}
    check_adapter(adapter(tmp_path / "kept", kept, modules_to_save=["lm_head"]), base)


def test_unsloths_extra_keys_do_no_harm(base: Path, tmp_path: Path) -> None:
    settings = {
        "auto_mapping": {"base_model_class": "Phi3ForCausalLM", "unsloth_fixed": True},
        "base_model_name_or_path": "unsloth/phi-3-mini-4k-instruct-bnb-4bit",
        "target_modules": [*TUTORIAL, "qkv_proj"],
        "unsloth_version": "2026.10.9",
    }
    check_adapter(adapter(tmp_path / "a", FITTING, **settings), base)


def test_an_unfused_adapter_is_refused_and_named(base: Path, tmp_path: Path) -> None:
    shapes = {k: v for n in TUTORIAL for k, v in pair(f"{ATTENTION}.{n}", 8, 8).items()}
    with pytest.raises(StageError) as caught:
        check_adapter(adapter(tmp_path / "a", shapes), base)
    told = str(caught.value)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert f"{ATTENTION}.{name}: no such layer" in told
    assert f"{ATTENTION}.o_proj" not in told
    assert "phi3 models convert" in told


@pytest.mark.parametrize(
    ("shapes", "settings", "told"),
    [
        (pair(f"{ATTENTION}.o_proj", 9, 8), {}, "of shape"),
        (pair(f"{ATTENTION}.o_proj", 8, 9), {}, "of shape"),
        ({f"{ATTENTION}.o_proj.lora_A.weight": (2, 8)}, {}, "only one of lora_A and lora_B"),
        (pair("model.layers.7.self_attn.o_proj", 8, 8), {}, "no such layer"),
        ({"lm_head.weight": (50, 8), **FITTING}, {}, "lm_head"),
        ({"lm_head.weight": (51, 8), **FITTING}, {"modules_to_save": ["lm_head"]}, "of shape"),
        ({}, {}, "no weights"),
        (FITTING, {"peft_type": "IA3"}, "LoRA and DoRA"),
    ],
)
def test_what_would_not_land_is_refused(
    base: Path, tmp_path: Path, shapes: Any, settings: Any, told: str
) -> None:
    with pytest.raises(StageError, match=told):
        check_adapter(adapter(tmp_path / "a", shapes, **settings), base)


def test_half_a_folder_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="is not an adapter"):
        check_adapter(tmp_path, base)
    folder = adapter(tmp_path / "a", FITTING)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(StageError, match=r"has no adapter_model\.safetensors"):
        check_adapter(folder, base)
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(StageError, match="cannot be read"):
        check_adapter(folder, base)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_the_old_name_of_longrope_is_refused_with_the_new_one(
    tmp_path: Path, key: str, name: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({key: {name: "su"}}), encoding="utf-8")
    with pytest.raises(StageError, match="longrope"):
        check_rope(tmp_path)
    config.write_text(json.dumps({key: {name: "longrope"}}), encoding="utf-8")
    check_rope(tmp_path)
    config.write_text(json.dumps({key: {name: "spiral"}}), encoding="utf-8")
    with pytest.raises(StageError, match="'spiral'"):
        check_rope(tmp_path)
    config.write_text(json.dumps({key: None}), encoding="utf-8")
    check_rope(tmp_path)
