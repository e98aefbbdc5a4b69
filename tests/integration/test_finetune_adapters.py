"""Several named adapters over one base: trained, listed, merged by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.integration.finetune_fixture import CHATS, make_base, make_recipe, write_chats

from phi3_training.cli import main
from phi3_training.errors import StageError, UsageError
from phi3_training.finetune.weights import find_adapter, list_adapters, load_model, merge_adapter
from phi3_training.manifests import BaseManifest, ModelManifest
from phi3_training.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two adapters, made on the command line; the second has learnt other answers."""
    folder = tmp_path_factory.mktemp("adapters")
    make_recipe(folder, make_base(folder / "model"))
    other = [[chat[0], {"role": "assistant", "content": "Nobody knows."}] for chat in CHATS]
    write_chats(folder / "other.jsonl", other)
    train = ["train", str(folder / "recipe.yaml"), "--runs", str(folder / "runs")]
    assert main([*train, "--adapter", "prices"]) == 0
    assert main([*train, "--adapter", "shy", f"data.train={folder / 'other.jsonl'}"]) == 0
    return folder


@pytest.fixture
def run(folder: Path) -> Run:
    return Run(folder / "runs" / "small")


def scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40)[None]).logits
    return found


def test_both_are_listed_and_over_one_base(run: Run) -> None:
    found = list_adapters(run)
    assert [adapter.name for adapter in found] == ["prices", "shy"]
    assert all(adapter.fits and adapter.notes["method"] == "lora" for adapter in found)
    assert all((adapter.path / "adapter_config.json").is_file() for adapter in found)
    model = run.read(ModelManifest)
    assert model is not None
    assert model.adapter == "adapters/shy"


def test_status_and_adapters_show_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(folder / "runs"), "-o", "json"]
    assert main(["status", *runs]) == 0
    assert json.loads(capsys.readouterr().out)[0]["adapters"] == ["prices", "shy"]
    assert main(["adapters", *runs]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed] == ["prices", "shy"]
    assert all(entry["final_loss"] > 0 for entry in listed)


def test_merged_by_name_is_the_adapter_on_its_base(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--runs", str(folder / "runs"), "-o", "json"]
    merged = {}
    for name in ("prices", "shy"):
        assert main(["adapters", "--merge", name, *runs]) == 0
        path = Path(json.loads(capsys.readouterr().out)["path"])
        assert (path / "tokenizer.json").is_file()
        merged[name] = scores(load_model(path, torch.float32))
        base = load_model(folder / "model", torch.float32)
        beside = PeftModel.from_pretrained(base, run.path / "adapters" / name).eval()
        assert torch.allclose(merged[name], scores(beside), atol=1e-4)
    assert not torch.allclose(merged["prices"], merged["shy"], atol=1e-2)


def test_two_adapters_live_on_one_loaded_base(folder: Path, run: Run) -> None:
    prices, shy = list_adapters(run)
    base = load_model(folder / "model", torch.float32)
    model = PeftModel.from_pretrained(base, prices.path, adapter_name="prices").eval()
    model.load_adapter(shy.path, adapter_name="shy")
    first = scores(model)
    model.set_adapter("shy")
    assert not torch.allclose(first, scores(model), atol=1e-2)


def test_an_unknown_adapter_names_the_known_ones(run: Run) -> None:
    with pytest.raises(UsageError, match=r"adapters: prices, shy.*--adapter french"):
        merge_adapter(run, "french")


def test_an_adapter_of_an_earlier_base_is_refused(run: Run) -> None:
    base = run.read(BaseManifest)
    assert base is not None
    run.write(base.model_copy(update={"done_id": "another"}))
    try:
        assert [adapter.fits for adapter in list_adapters(run)] == [False, False]
        with pytest.raises(StageError, match="earlier base"):
            find_adapter(run, "shy")
    finally:
        run.write(base)


def test_a_foreign_adapter_is_merged_whole_or_not_at_all(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """As unsloth writes one for Phi-3: q, k and v apart, which peft would leave out in silence."""
    foreign = run.path / "adapters" / "foreign"
    shutil.copytree(run.path / "adapters" / "shy", foreign)
    weights = load_file(foreign / "adapter_model.safetensors")
    split = {}
    for name, weight in weights.items():
        if "qkv_proj" not in name:
            split[name] = weight
            continue
        size = weight.shape[0] // 4  # two query heads for each key and value head
        parts = (weight,) * 3 if "lora_A" in name else weight.split([2 * size, size, size])
        for part, piece in zip("qkv", parts, strict=True):
            split[name.replace("qkv_proj", f"{part}_proj")] = piece.clone()
    save_file(split, foreign / "adapter_model.safetensors")
    words = ["adapters", "--merge", "foreign", "--runs", str(folder / "runs")]
    try:
        assert main(words) == 1
        told = capsys.readouterr().err
        assert "q_proj: no such layer" in told
        assert not (run.path / "merged" / "foreign").exists()

        # peft's own form, with the keys that unsloth adds, is dropped in and merged.
        save_file(weights, foreign / "adapter_model.safetensors")
        settings = json.loads((foreign / "adapter_config.json").read_text())
        settings["auto_mapping"] = {"base_model_class": "Phi3ForCausalLM", "unsloth_fixed": True}
        settings["unsloth_version"] = "2026.10.9"
        (foreign / "adapter_config.json").write_text(json.dumps(settings))
        (foreign / "phi3.json").unlink()
        assert main(words) == 0
        merged = scores(load_model(run.path / "merged" / "foreign", torch.float32))
        base = load_model(folder / "model", torch.float32)
        beside = PeftModel.from_pretrained(base, run.path / "adapters" / "shy").eval()
        assert torch.allclose(merged, scores(beside), atol=1e-4)

        (foreign / "adapter_model.safetensors").rename(foreign / "adapter_model.bin")
        with pytest.raises(StageError, match="is not a complete adapter"):
            find_adapter(run, "foreign")
    finally:
        shutil.rmtree(foreign)


def test_the_same_command_again_trains_nothing(
    folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run.path / "adapters" / "shy" / "adapter_model.safetensors").stat().st_mtime_ns
    words = ["train", str(folder / "recipe.yaml"), "--runs", str(folder / "runs")]
    again = [*words, "--adapter", "shy", f"data.train={folder / 'other.jsonl'}"]
    assert main(again) == 0
    assert "already done" in capsys.readouterr().err
    after = (run.path / "adapters" / "shy" / "adapter_model.safetensors").stat().st_mtime_ns
    assert after == before
