"""Methods, accumulation, checkpointing, early stopping, tracking: a small Phi-3 really trained."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.integration.finetune_fixture import HELD_OUT, loss_log, make_base, make_recipe, make_run

from phi3_training.errors import MissingExtraError, RecipeError, StageError
from phi3_training.finetune import finetune
from phi3_training.finetune.weights import (
    chat_format,
    check_method,
    four_bit,
    learn_in_float32,
    load_model,
    peft_config,
)
from phi3_training.manifests import ModelManifest
from phi3_training.run import Run

Trained = Callable[..., tuple[Run, ModelManifest]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def trained(tmp_path: Path, base: Path) -> Trained:
    """Fine-tune with overrides; the run and its manifest."""

    def train(*overrides: str, name: str = "a") -> tuple[Run, ModelManifest]:
        recipe = make_recipe(tmp_path / name, base, *overrides)
        run = make_run(tmp_path / name, recipe)
        return run, finetune(recipe, run)

    return train


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40)[None]).logits
    return found


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_each_method_learns_and_merges(trained: Trained, base: Path, method: str) -> None:
    run, manifest = trained(f"finetune.method={method}")
    assert manifest.final_loss < manifest.first_loss
    merged = scores(load_model(run.path / "model", torch.float32))
    assert not torch.allclose(merged, scores(load_model(base, torch.float32)), atol=1e-3)
    if method == "full":
        assert manifest.adapter is None
        assert manifest.trained_parameters == manifest.parameters
        return
    assert manifest.trained_parameters < manifest.parameters / 2
    adapter = run.path / manifest.adapter
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"] == (
        method == "dora"
    )
    beside = PeftModel.from_pretrained(load_model(base, torch.float32), adapter)
    assert torch.allclose(scores(beside.eval()), merged, atol=1e-4)


def test_qlora_is_refused_without_cuda_before_weights_are_read(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageError, match=r"CUDA GPU.*trains on: .*finetune\.method=lora"):
        trained("finetune.method=qlora")
    assert "Traceback" not in capfd.readouterr().err


def test_qlora_needs_its_package(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = make_recipe(tmp_path, base, "finetune.method=qlora")
    with pytest.raises(MissingExtraError, match=r"phi3-promptflow\[qlora\]"):
        check_method(recipe.finetune, "cuda")


def test_qlora_loads_four_bit_normal_floats(monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    options = four_bit(torch.bfloat16, "cuda")
    config = options["quantization_config"]
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert options["device_map"] == {"": 1}


def test_an_adapter_can_learn_in_float32_over_weights_that_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    learn_in_float32(model)
    assert [weight.dtype for weight in model.parameters()] == [
        *[torch.bfloat16] * 2,
        *[torch.float32] * 2,
    ]


def test_bottleneck_adapters_are_refused_with_the_reason(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="peft has no bottleneck adapters"):
        make_recipe(tmp_path, base, "finetune.method=adapter")


def test_settings_that_do_not_fit_the_model(trained: Trained) -> None:
    with pytest.raises(StageError, match=r"finetune\.target_modules"):
        trained("finetune.target_modules=[no_such_layer]")


def test_names_of_separate_matrices_train_the_fused_one(trained: Trained) -> None:
    names = "[q_proj,k_proj,v_proj,o_proj]"
    run, manifest = trained(f"finetune.target_modules={names}", name="tutorial")
    weights = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"qkv_proj", "o_proj"}
    assert any("q_proj, k_proj, v_proj trained as qkv_proj" in c for c in manifest.choices)


def test_accumulation_is_one_step_with_the_same_result(trained: Trained) -> None:
    once, _ = trained("finetune.num_train_epochs=1", name="once")
    parts, manifest = trained(
        "finetune.num_train_epochs=1",
        "finetune.per_device_train_batch_size=2",
        "finetune.gradient_accumulation_steps=4",
        name="parts",
    )
    assert manifest.steps == 1
    one = load_file(once.path / "adapter" / "adapter_model.safetensors")
    four = load_file(parts.path / "adapter" / "adapter_model.safetensors")
    for name, weight in one.items():
        assert torch.allclose(weight, four[name], atol=2e-5), name


def test_gradient_checkpointing_changes_nothing_and_says_nothing(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    _, plain = trained(name="plain")
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        run, saving = trained("finetune.gradient_checkpointing=true", name="saving")
    assert saving.final_loss == pytest.approx(plain.final_loss, abs=1e-5)
    assert saving.first_loss == pytest.approx(plain.first_loss, abs=1e-5)
    out = capfd.readouterr()
    assert out.out + out.err == ""
    assert [str(w.message) for w in warned if w.category is FutureWarning] == []
    assert len(loss_log(run)) == 3


@pytest.mark.parametrize("packing", ["false", "true"])
def test_bfloat16_is_reported_with_its_reason(trained: Trained, packing: str) -> None:
    run, manifest = trained("model.dtype=bfloat16", f"finetune.packing={packing}")
    assert manifest.final_loss < manifest.first_loss
    assert manifest.settings["dtype"] == "bfloat16"
    assert "bfloat16: as the recipe says" in manifest.choices
    weights = load_file(run.path / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_early_stopping_keeps_the_best_weights(trained: Trained) -> None:
    run, manifest = trained(
        "finetune.eval_steps=1",
        "finetune.early_stopping_patience=2",
        "finetune.num_train_epochs=60",
        "finetune.learning_rate=0.3",
        "finetune.lr_scheduler_type=constant",
    )
    lines = (run.path / "finetune" / "eval.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    best = losses.index(min(losses))
    assert manifest.steps == len(losses) < 60
    assert len(losses) - 1 - best == 2
    assert any(f"using the weights of step {best + 1}" in line for line in manifest.choices)
    assert _held_out_loss(run) == pytest.approx(min(losses), abs=1e-4)
    assert manifest.validation_loss == pytest.approx(min(losses), abs=1e-5)
    assert not (run.path / "finetune" / "best.safetensors").exists()


def _held_out_loss(run: Run) -> float:
    """Computed directly: mean surprise at the answers' tokens, row after row."""
    chat = chat_format(run.path / "model")
    model = load_model(run.path / "model", torch.float32)
    total, count = 0.0, 0
    for messages in HELD_OUT:
        example = chat.encode_example(messages)
        surprise = -scores_of(model, example.input_ids).log_softmax(-1)
        for at in range(1, len(example.input_ids)):
            if example.assistant_mask[at]:
                total += float(surprise[at - 1, example.input_ids[at]])
                count += 1
    return total / count


def scores_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0].double()
    return found


def test_patience_without_evaluations_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="set eval_steps as well"):
        make_recipe(tmp_path, base, "finetune.early_stopping_patience=2")


def test_mlflow_has_every_step(trained: Trained) -> None:
    run, manifest = trained("finetune.report_to=[mlflow]")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [entry.step for entry in history] == list(range(1, manifest.steps + 1))
    assert history[-1].value == pytest.approx(manifest.final_loss, abs=1e-4)
    assert found.data.params["learning_rate"] == "0.01"
    assert found.info.status == "FINISHED"


def test_tensorboard_has_every_step(trained: Trained) -> None:
    pytest.importorskip("tensorboard")
    run, manifest = trained("finetune.report_to=[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    shown = events.Scalars("loss")
    assert [entry.step for entry in shown] == [1, 2, 3]
    assert shown[-1].value == pytest.approx(manifest.final_loss, abs=1e-4)


def test_missing_tensorboard_is_reported(trained: Trained, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"phi3-promptflow\[tensorboard\]"):
        trained("finetune.report_to=[tensorboard]")


def test_full_puts_nothing_beside_the_weights(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, base, "finetune.method=full")
    assert peft_config(recipe.finetune) is None
    with pytest.raises(RecipeError, match="method full trains no adapter"):
        make_recipe(tmp_path, base, "finetune.method=full", "finetune.adapter=x")
