"""`phi3 export`: true exports pass and are served; wrong merges and stale graphs are caught."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.integration.server_fixture import PAIRS, Taught

from phi3_training.cli import main
from phi3_training.finetune.weights import chat_format, load_model, merge, with_adapter
from phi3_training.manifests import EXPORTS, BaseManifest, ExportCheck, ModelManifest
from phi3_training.recipe import load_recipe
from phi3_training.run import Run
from phi3_training.serve.export import converted, export_onnx
from phi3_training.targets.local import server_config

pytest_plugins = ["tests.integration.server_plugin"]


def no_progress(_done: int, _total: int, _text: str) -> None:
    pass


@pytest.fixture(scope="module")
def pattern(taught: Taught, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter changes each layer a little; nothing was trained for it."""
    run = Run.open(tmp_path_factory.mktemp("runs") / "r")
    shutil.copytree(taught.model_dir, run.path / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(load_model(run.path / "base", torch.float32), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.02)
    model.save_pretrained(run.path / "adapter")
    remerge(run, torch.float32)
    run.write(BaseManifest(path="base", done_id="b"))
    settings = {"dtype": "float32", "method": "lora"}
    run.write(ModelManifest(path="model", adapter="adapter", done_id="m", settings=settings))
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in PAIRS[:12]
    ]
    run.file("data", "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return run.path


@pytest.fixture
def run(pattern: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(pattern, tmp_path / "runs" / "r")))


def remerge(run: Run, dtype: torch.dtype) -> None:
    base = run.path / "base"
    whole = with_adapter(base, run.path / "adapter", dtype)
    merge(whole, chat_format(base), run.path / "model", base, dtype)


def exported(run: Run, to: str) -> int:
    return main(["export", "--to", to, "--run", run.name, "--runs", str(run.path.parent)])


def problems(run: Run, to: str) -> str:
    return "\n".join(check_of(run, to).problems)


def check_of(run: Run, to: str) -> ExportCheck:
    check = run.require(EXPORTS[to]).check
    assert check is not None
    return check


def test_a_true_merge_passes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert exported(run, "merged") == 0
    check = check_of(run, "merged")
    assert run.require(EXPORTS["merged"]).path == "model"
    assert check.passed
    assert check.token_agreement == 1.0
    assert check.mean_kl < 1e-6
    assert check.layers is not None
    assert check.layers.largest < 1e-6
    assert check.layers.count > 10
    assert check.held_out is not None
    assert check.held_out.rows == 12
    assert "same token chosen" in capsys.readouterr().out


def test_a_merge_in_another_number_type_is_caught(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    remerge(run, torch.bfloat16)
    assert exported(run, "merged") == 1
    assert "weights are bfloat16, but the model was trained" in problems(run, "merged")
    assert "Over the limit" in capsys.readouterr().out


@pytest.mark.slow
def test_a_merge_that_was_rounded_on_the_way_is_caught(run: Run) -> None:
    """Merged in bfloat16, saved as float32: the files look right, the layers do not."""
    remerge(run, torch.bfloat16)
    model = load_model(run.path / "model", torch.float32)
    model.save_pretrained(run.path / "model")
    assert exported(run, "merged") == 1
    assert "the layer model." in problems(run, "merged")
    assert "bfloat16" not in problems(run, "merged")


def test_a_layer_without_its_adapter_is_named(run: Run) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    file = run.path / "model" / "model.safetensors"
    weights = load_file(file)
    weights[name] = load_file(run.path / "base" / "model.safetensors")[name]
    save_file(weights, file, metadata={"format": "pt"})
    assert exported(run, "merged") == 1
    assert f"the layer {name} lost 100.0% of what the adapter changes" in problems(run, "merged")


def test_a_missing_adapter_is_caught(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.path / "adapter")
    assert exported(run, "merged") == 1
    assert "is not an adapter" in capsys.readouterr().err
    assert run.read(EXPORTS["merged"]) is None


@pytest.mark.slow
def test_a_base_served_as_the_tuned_model_is_caught(run: Run) -> None:
    """The adapter was not merged at all."""
    shutil.copyfile(
        run.path / "base" / "model.safetensors", run.path / "model" / "model.safetensors"
    )
    assert exported(run, "merged") == 1
    assert "lost 100.0%" in problems(run, "merged")


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_an_onnx_export_passes_and_is_served(run: Run, precision: str) -> None:
    assert exported(run, f"onnx-{precision}") == 0, problems(run, f"onnx-{precision}")
    assert check_of(run, f"onnx-{precision}").compared_with == "merged"
    graph = run.path / f"onnx-{precision}" / "model.onnx"
    before = graph.stat().st_mtime_ns
    (run.path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = run.path / "recipe.yaml"
    recipe.write_text("name: r\nmodel: {name_or_path: base}\ndata: {train: chats.jsonl}\n")
    asked = ["serve.engine=onnxruntime", f"serve.precision={precision}"]
    config, engine, _ = server_config(load_recipe(recipe, asked), run, no_progress)
    assert (engine, config.onnx_dir) == ("onnxruntime", graph.parent)
    assert graph.stat().st_mtime_ns == before, "an export is not made twice"


def test_a_graph_of_other_weights_is_caught_by_a_prompt(run: Run) -> None:
    """As when the builder misreads a model: here it was given the base."""
    folder = converted(run, "fp32", no_progress)
    export_onnx(run.path / "base", folder, "fp32")
    assert exported(run, "onnx-fp32") == 1
    assert "worst prompt: '" in problems(run, "onnx-fp32")


def test_a_new_model_is_converted_again(run: Run) -> None:
    folder = converted(run, "fp32", no_progress)
    first = (folder / "model.onnx").stat().st_mtime_ns
    run.write(run.require(ModelManifest).model_copy(update={"done_id": "another"}))
    assert (converted(run, "fp32", no_progress) / "model.onnx").stat().st_mtime_ns > first


def test_a_model_trained_whole_has_nothing_to_merge(run: Run) -> None:
    run.write(run.require(ModelManifest).model_copy(update={"adapter": None}))
    assert exported(run, "merged") == 0
    assert "no merged adapter" in (check_of(run, "merged").note or "")
