"""The base model: made here and the same each time, or found, with refusals that say what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.integration.tiny_model import (
    KNOWN,
    chat_row,
    tiny_model_folder,
    tiny_recipe,
    write_chats,
)

from phi3_training.errors import DataError, StageError
from phi3_training.finetune import prepare_base
from phi3_training.finetune.weights import find_weights, load_model
from phi3_training.manifests import BaseManifest
from phi3_training.models.folder import new_folder
from phi3_training.progress import no_progress
from phi3_training.prompt import ChatFormat
from phi3_training.recipe import BaseSection, ModelSection
from phi3_training.run import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    made = tiny_model_folder()
    return Path(shutil.copytree(made, tmp_path / "weights"))


def find(name: str | Path, revision: str | None = None) -> Path:
    return find_weights(ModelSection(name_or_path=str(name), revision=revision), no_progress)


def short_base(chats: Path, **changes: object) -> BaseSection:
    base = tiny_recipe(chats).base
    assert base is not None
    return base.model_copy(update={"num_train_epochs": 2, **changes})


def make(tmp: Path, name: str, chats: Path, **changes: object) -> BaseManifest:
    recipe = tiny_recipe(chats).model_copy(update={"base": short_base(chats, **changes)})
    return prepare_base(recipe, Run.open(tmp / name))


def test_the_same_seed_makes_the_same_model(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", KNOWN)
    first, second = (make(tmp_path, name, chats) for name in ("one", "two"))
    other = make(tmp_path, "three", chats, seed=7)
    assert first.losses == second.losses != other.losses
    weights = [tmp_path / name / "base" / "model.safetensors" for name in ("one", "two", "three")]
    one, two, three = (path.read_bytes() for path in weights)
    assert one == two != three


def test_unfinished_base_training_is_reported(tmp_path: Path) -> None:
    manifest = make(tmp_path, "run", write_chats(tmp_path / "chats.jsonl", KNOWN))
    assert "base.num_train_epochs" in str(manifest.choices)


def test_teaching_stops_at_the_target_loss(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", KNOWN)
    manifest = make(tmp_path, "run", chats, num_train_epochs=9, target_loss=100.0)
    assert len(manifest.losses) == 1
    assert manifest.choices == []


def test_tokens_that_the_base_never_says_can_still_be_learnt(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", KNOWN)
    make(tmp_path, "run", chats, num_train_epochs=5)
    folder = tmp_path / "run" / "base"
    chat = ChatFormat.from_folder(folder)
    said: set[int] = set()
    for question, answer in KNOWN.items():
        example = chat.encode_example(chat_row(question, answer)["messages"])
        pairs = zip(example.input_ids, example.assistant_mask, strict=True)
        said |= {token for token, learnt in pairs if learnt}
    lengths = load_model(folder, torch.float32).lm_head.weight.norm(dim=1)
    unsaid = torch.tensor([token not in said for token in range(len(lengths))])
    assert unsaid.any()
    assert torch.allclose(lengths[unsaid], lengths[~unsaid].mean(), rtol=1e-4)


def test_base_chats_may_have_any_known_format(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = [json.dumps({"prompt": q, "completion": a}) for q, a in KNOWN.items()]
    chats.write_text("\n".join(lines), "utf-8")
    assert make(tmp_path, "run", chats).conversations == len(KNOWN)


def test_faulty_base_chats_teach_nothing(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": []}\n', "utf-8")
    with pytest.raises(DataError, match=r"chats\.jsonl"):
        make(tmp_path, "run", chats)
    assert not (tmp_path / "run" / "base").exists()


def test_too_long_base_chats_leave_no_half_folder(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", {"Tell me?": "word " * 300})
    with pytest.raises(StageError, match=r"cut-answer \(1 of 1 rows\)") as caught:
        make(tmp_path, "run", chats)
    message = str(caught.value)
    assert "chats.jsonl:1 ('Tell me?')" in message
    assert "base.max_position_embeddings" in message
    assert "--allow" not in message  # nothing of a base model's chats can be let pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_is_found(folder: Path) -> None:
    assert find(folder) == folder


@pytest.mark.parametrize("name", ["some-org/no-such-model", "/no/such/folder", "not a name!"])
def test_weights_that_are_not_there(name: str) -> None:
    with pytest.raises(StageError) as caught:
        find(name, revision="v1")
    message = str(caught.value)
    assert f"{name!r} (revision v1)" in message
    assert "model.name_or_path=/path/to/folder" in message
    assert "HF_HOME" in message
    assert "network" in message


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(StageError, match="contains no weights"):
        find(folder)


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(StageError, match="not a model folder"):
        find(folder)


def test_folder_without_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="no chat template"):
        find(folder)


def test_folder_of_another_kind_of_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["architectures"] = ["Phi3ForTokenClassification"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(StageError, match="Phi3ForTokenClassification; expected a causal"):
        find(folder)


def test_code_in_a_model_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["model_type"] = "something-of-its-own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", "utf-8")
    with pytest.raises(StageError):
        find(folder)
    assert not (tmp_path / "ran").exists()


def test_broken_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(StageError, match="cannot be loaded"):
        load_model(folder, torch.float32)


def test_new_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with new_folder(target) as folder:
            (folder / text).write_text(text, "utf-8")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def write_half(target: Path) -> None:
    with new_folder(target) as folder:
        (folder / "half").write_text("half", "utf-8")
        raise KeyboardInterrupt


def test_a_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target) as folder:
        (folder / "old").write_text("old", "utf-8")
    with pytest.raises(KeyboardInterrupt):
        write_half(target)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_attempt_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".model.abc123"
    left.mkdir()
    (left / "half").write_text("half", "utf-8")
    with new_folder(tmp_path / "model") as folder:
        (folder / "whole").write_text("whole", "utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
