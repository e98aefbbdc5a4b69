"""The server's settings and its choice of an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_training.engine import choose_engine
from phi3_training.errors import UsageError
from phi3_training.recipe.sections import ServeSection
from phi3_training.serve.config import ServerConfig
from phi3_training.serve.loading import load_engine
from phi3_training.serve.server import read_keys


def test_settings_survive_the_file(tmp_path: Path) -> None:
    config = ServerConfig(onnx_dir=tmp_path, port=8080, dialect="fms")
    (tmp_path / "s.json").write_text(config.to_json())
    assert ServerConfig.from_file(tmp_path / "s.json") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Invalid JSON"),
        ('{"prot": 1}', "prot: Extra inputs"),
        ('{"port": 70000, "dialect": "x"}', "port:.*dialect:"),
    ],
)
def test_faults_are_named_together(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        ServerConfig.from_file(tmp_path / "s.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"s\.json cannot be read"):
        ServerConfig.from_file(tmp_path / "s.json")


def test_an_engine_that_is_asked_for_is_taken() -> None:
    assert choose_engine("transformers") == ("transformers", "set in the recipe")
    name, reason = choose_engine("auto")
    assert name in ("onnxruntime", "transformers")
    assert reason


def test_the_earlier_name_of_the_engine_is_read_as_the_new_one() -> None:
    assert ServeSection.model_validate({"engine": "ort-genai"}).engine == "onnxruntime"
    assert ServerConfig.model_validate({"engine": "ort-genai"}).engine == "onnxruntime"


@pytest.mark.parametrize(
    ("engine", "setting"),
    [("upstream", "upstream_url"), ("onnxruntime", "onnx_dir"), ("transformers", "model_dir")],
)
def test_an_engine_without_its_setting(engine: str, setting: str) -> None:
    if engine != "upstream":
        pytest.importorskip("torch" if engine == "transformers" else "onnxruntime")
    with pytest.raises(UsageError, match=setting):
        load_engine(ServerConfig.model_validate({"engine": engine}))


def test_the_key_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3_KEY", "k1")
    monkeypatch.setenv("PHI3_UPSTREAM_KEY", "k2")
    assert read_keys(from_stdin=False) == ("k1", "k2")
    with pytest.raises(UsageError, match="PHI3_KEY"):
        read_keys(from_stdin=False)
