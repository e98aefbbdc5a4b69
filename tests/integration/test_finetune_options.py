"""Options of a training that change what is learnt: steps, rewordings, noise, adapter weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.integration.finetune_fixture import CHATS, loss_log, make_base, make_recipe, make_run

from phi3_training.errors import RecipeError
from phi3_training.finetune import finetune
from phi3_training.manifests import ModelManifest
from phi3_training.run import Run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("options") / "base")


def trained(folder: Path, base: Path, *overrides: str) -> tuple[Run, ModelManifest]:
    recipe = make_recipe(folder, base, *overrides)
    run = make_run(folder, recipe)
    return run, finetune(recipe, run)


def difference(run: Run, base: Path) -> torch.Tensor:
    """What training added to one matrix."""
    name = "model.layers.0.mlp.down_proj.weight"
    after = load_file(run.path / "model/model.safetensors")[name]
    return after - load_file(base / "model.safetensors")[name]


def test_the_adapter_adds_the_share_that_is_asked_for(tmp_path: Path, base: Path) -> None:
    whole, _ = trained(tmp_path / "whole", base)
    part, _ = trained(tmp_path / "part", base, "finetune.adapter_weight=0.25")
    added = difference(whole, base)
    assert added.abs().max() > 1e-4
    torch.testing.assert_close(difference(part, base), added * 0.25, rtol=1e-4, atol=1e-6)


def test_what_is_no_adapter_has_no_weight(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match="adapter_weight"):
        make_recipe(tmp_path, base, "finetune.method=full", "finetune.adapter_weight=0.5")


def test_noise_changes_the_training_and_is_off_by_default(tmp_path: Path, base: Path) -> None:
    def losses(name: str, *overrides: str) -> list[float]:
        run, _ = trained(tmp_path / name, base, *overrides)
        return [line["loss"] for line in loss_log(run)]

    plain = losses("plain")
    assert losses("again") == plain
    assert losses("noisy", "finetune.neftune_noise_alpha=20") != plain


def test_steps_are_counted_whatever_the_epochs_say(tmp_path: Path, base: Path) -> None:
    _, manifest = trained(tmp_path, base, "finetune.max_steps=5")
    assert manifest.steps == 5


def test_rewordings_are_trained_on_and_counted(tmp_path: Path, base: Path) -> None:
    _, manifest = trained(tmp_path, base, "data.rewordings=2")
    assert manifest.conversations == {
        "train": len(CHATS),
        "casual_copies": 0,
        "rewordings": 2 * len(CHATS),
        "replay": 0,
    }
