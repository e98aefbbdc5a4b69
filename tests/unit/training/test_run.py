"""The run folder: whole manifests or none, one worker at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training.errors import StageError, UsageError
from phi3_training.manifests import ModelManifest
from phi3_training.run import Run, fingerprint, write_atomically


def test_manifest_round_trip(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "a")
    written = ModelManifest(path="model", summary="é", settings={"lora_r": 4}, done_id="1")

    run.write(written)

    assert run.read(ModelManifest) == written
    assert [path.name for path in run.path.iterdir()] == ["model.json"]
    assert json.loads((run.path / "model.json").read_text(encoding="utf-8")) == {
        "version": 1,
        "stage": "model",
        "path": "model",
        "summary": "é",
        "settings": {"lora_r": 4},
        "done_id": "1",
    }


def test_a_key_that_is_not_known_is_ignored(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "a")
    (run.path / "model.json").write_text('{"version": 1, "path": "model", "of_later": 1}')

    assert run.require(ModelManifest) == ModelManifest(path="model")


def test_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="phi3 train --run a"):
        Run.open(tmp_path / "a").require(ModelManifest)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{", "Expecting property name"),
        ("[]", "its version is not 1"),
        ('{"version": 99}', "its version is not 1"),
        ("", "Expecting value"),
        ('{"version": 1}', "path: Field required"),
        ('{"version": 1, "path": "model", "steps": "many"}', "steps: Input should be a valid int"),
    ],
)
def test_broken_manifest_is_reported(tmp_path: Path, text: str, wrong: str) -> None:
    run = Run.open(tmp_path / "a")
    (run.path / "model.json").write_text(text, encoding="utf-8")

    with pytest.raises(
        StageError, match=r"model\.json .* delete the file .* phi3 train --run a"
    ) as told:
        run.read(ModelManifest)
    assert wrong in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["-a", "a b", ".hidden", "x" * 65])
def test_bad_run_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a run name"):
        Run.open(tmp_path / name)


def test_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(UsageError, match="--runs FOLDER"):
        Run.open(tmp_path / "file" / "a")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")

    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_one_worker_at_a_time(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "a")

    with run.lock(), pytest.raises(StageError, match="Another phi3"), Run(run.path).lock():
        pass

    with run.lock():
        pass


def test_fingerprint_ignores_key_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
