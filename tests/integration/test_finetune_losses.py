"""Losses by entry point: found, used, and changing what is learnt."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.integration.finetune_fixture import make_base, make_recipe, make_run

from phi3_training.errors import StageError
from phi3_training.finetune import finetune
from phi3_training.finetune.losses import LossInput, contrastive

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
calls = []

def doubled(batch):
    calls.append(tuple(batch.logits.shape[:2]) == tuple(batch.labels.shape))
    return 2 * batch.cross_entropy()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that offers losses, the shipped one under setup.py's own line."""
    shipped = "contrastive = phi3_training.finetune.losses:contrastive"
    assert f'"phi3_training.losses": ["{shipped}"]' in (ROOT / "setup.py").read_text()
    site = tmp_path / "site"
    info = site / "somebody_losses-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[phi3_training.losses]\n"
        f"{shipped}\n"
        "doubled = somebody_losses:doubled\n"
        "broken = somebody_losses:no_such_function\n"
    )
    (site / "somebody_losses.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("somebody_losses", None)


@pytest.fixture
def plain(tmp_path: Path, base: Path) -> float:
    recipe = make_recipe(tmp_path / "plain", base)
    return float(finetune(recipe, make_run(tmp_path / "plain", recipe)).first_loss)


@pytest.mark.usefixtures("package")
def test_a_packages_loss_is_what_is_minimised(tmp_path: Path, base: Path, plain: float) -> None:
    recipe = make_recipe(tmp_path / "own", base, "finetune.loss=doubled")
    manifest = finetune(recipe, make_run(tmp_path / "own", recipe))
    assert manifest.first_loss == pytest.approx(2 * plain, rel=1e-4)
    assert manifest.settings["loss"] == "doubled"
    assert sys.modules["somebody_losses"].calls == [True] * manifest.steps


@pytest.mark.usefixtures("package")
def test_contrastive_is_used_and_changes_the_loss(tmp_path: Path, base: Path, plain: float) -> None:
    for name, extra in {"whole": [], "packed": ["finetune.packing=true"]}.items():
        recipe = make_recipe(tmp_path / name, base, "finetune.loss=contrastive", *extra)
        manifest = finetune(recipe, make_run(tmp_path / name, recipe))
        assert manifest.first_loss > plain + 0.001
        assert manifest.final_loss < manifest.first_loss


@pytest.mark.usefixtures("package")
def test_a_loss_does_not_depend_on_accumulation(tmp_path: Path, base: Path) -> None:
    losses = []
    for name, extra in {
        "once": [],
        "parts": [
            "finetune.per_device_train_batch_size=2",
            "finetune.gradient_accumulation_steps=4",
        ],
    }.items():
        recipe = make_recipe(tmp_path / name, base, "finetune.loss=contrastive", *extra)
        losses.append(finetune(recipe, make_run(tmp_path / name, recipe)).first_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_contrastive_is_the_sum_over_pairs() -> None:
    torch.manual_seed(1)
    hidden, logits = torch.randn(2, 6, 5), torch.randn(2, 6, 9)
    labels = torch.randint(0, 9, (2, 6))
    labels[0, :3] = -100
    labels[1, 1:] = -100  # one learnt token: no pair
    batch = LossInput(hidden, logits, labels, items=4)
    states = hidden[0, 3:] / hidden[0, 3:].norm(dim=-1, keepdim=True)
    push = sum(
        max(0.0, 0.5 - 1 + float(states[i] @ states[j]))
        for i in range(3)
        for j in range(3)
        if i != j
    )
    expected = float(batch.cross_entropy()) + push / 2 / 4
    assert float(contrastive(batch)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("package")
def test_an_unknown_or_broken_loss_is_named(tmp_path: Path, base: Path) -> None:
    for name, words in {
        "nowhere": "There is no loss 'nowhere'.*installed ones: broken, contrastive, doubled",
        "broken": "somebody_losses:no_such_function.*cannot be loaded",
    }.items():
        recipe = make_recipe(tmp_path / name, base, f"finetune.loss={name}")
        with pytest.raises(StageError, match=words):
            finetune(recipe, make_run(tmp_path / name, recipe))
