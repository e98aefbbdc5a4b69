"""A model's sizes from its config alone, and which of its matrices get an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3_training.memory.model import KNOWN, UnknownShapeError, shape_from, shape_of
from phi3_training.recipe import Recipe

MINI = "microsoft/Phi-3-mini-4k-instruct"


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that lies in the Hugging Face cache of who runs the tests counts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def recipe(name: str = "tiny", **base: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"name_or_path": name},
            "base": {"data": ["x"], **base} if name == "tiny" else None,
            "data": {"train": ["x"]},
        }
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        (MINI, 3_821_079_552),
        ("microsoft/Phi-3-mini-128k-instruct", 3_821_079_552),
        ("microsoft/Phi-3.5-mini-instruct", 3_821_079_552),
        ("microsoft/Phi-4-mini-instruct", 3_836_021_760),
    ],
)
def test_table_gives_the_published_number_of_weights(name: str, published: int) -> None:
    shape = shape_of(recipe(name))
    assert shape.parameters == published
    assert shape.source.startswith(f"our table for {name}")


def test_tiny_is_read_from_the_recipe() -> None:
    shape = shape_of(recipe(vocab_size=400, hidden_size=64, intermediate_size=96))
    assert (shape.vocab, shape.hidden, shape.head_dim, shape.context) == (400, 64, 16, 512)
    assert shape.source == "the recipe's base section"


def test_folder_is_read_from_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**KNOWN[MINI], "num_hidden_layers": 3}))
    shape = shape_of(recipe(str(tmp_path)))
    assert shape.layers == 3
    assert shape.source == str(tmp_path / "config.json")


def test_cached_config_comes_before_the_table(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache/models--microsoft--Phi-3-mini-4k-instruct/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({**KNOWN[MINI], "num_hidden_layers": 5}))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    shape = shape_of(recipe(MINI))
    assert shape.layers == 5
    assert "Hugging Face cache" in shape.source


@pytest.mark.parametrize("name", ["nobody/nothing", "not a name!"])
def test_unknown_model_names_what_helps(name: str) -> None:
    with pytest.raises(UnknownShapeError, match="=/path/to/folder"):
        shape_of(recipe(name))


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": 8}'])
def test_unreadable_or_foreign_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnknownShapeError):
        shape_of(recipe(str(tmp_path)))


def test_mixture_of_experts_is_refused() -> None:
    with pytest.raises(UnknownShapeError, match="mixture-of-experts"):
        shape_from({**KNOWN[MINI], "num_local_experts": 16}, "it")


def test_other_families_have_split_matrices() -> None:
    shape = shape_from({**KNOWN[MINI], "model_type": "llama"}, "it")
    assert [linear.name.rpartition(".")[2] for linear in shape.linears] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert shape.parameters == shape_from(KNOWN[MINI], "it").parameters


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("all-linear", 4),
        (["qkv_proj", "o_proj"], 2),
        (["mlp.down_proj"], 1),
        (["proj"], 0),
        (r".*\.mlp\..*", 2),
    ],
)
def test_adapters_are_chosen_as_peft_does(wanted: str | list[str], found: int) -> None:
    assert len(shape_from(KNOWN[MINI], "it").adapted(wanted)) == found


def test_prediction_needs_no_torch() -> None:
    code = (
        "import sys, phi3_training.memory as m, phi3_training.memory.inference as i;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
