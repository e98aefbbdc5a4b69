"""How many threads ONNX Runtime gets: by the size of all weights, whatever their file is called."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from phi3_training.serve.engines.onnxruntime import threads_for


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.int8.data"])
def test_a_large_model_gets_every_core_in_any_precision(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.onnx").touch()
    os.truncate(tmp_path / "model.onnx", 1000)
    with (tmp_path / name).open("ab") as file:
        file.truncate(100 * 2**20)  # sparse: takes no disk
    assert threads_for(tmp_path) == (psutil.cpu_count(logical=False) or os.cpu_count())


def test_a_small_model_gets_one_thread(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    assert threads_for(tmp_path) == 1
