"""Phi-3's variants, converted: attention windows (mini-4k) and LongRoPE (128k, Phi-4-mini).

The converted model must go on exactly as the original does, past the window and past the switch.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.integration.server_fixture import PAIRS, Taught

from phi3_training.serve.engines import onnxruntime, transformers
from phi3_training.serve.engines.base import Engine, Sampling
from phi3_training.serve.export import export_onnx

pytest_plugins = ("tests.integration.server_plugin",)

LONG = Sampling(max_new_tokens=80, temperature=0.0, ignore_eos=True)
QUESTIONS = [PAIRS[3][0], " ".join(PAIRS[n][0] for n in range(4)), PAIRS[9][0]]


def variant(taught: Taught, folder: Path, **config: Any) -> Path:
    """A copy of the taught model under another configuration."""
    shutil.copytree(taught.model_dir, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def answers(engine: Engine) -> list[str]:
    """All questions at once."""

    async def one(question: str) -> str:
        messages = [{"role": "user", "content": question}]
        return "".join([chunk.text async for chunk in engine.stream(messages, LONG)])

    async def main() -> list[str]:
        found = await asyncio.gather(*[one(question) for question in QUESTIONS])
        await engine.close()
        return found

    return asyncio.run(main())


def both(model_dir: Path, onnx_dir: Path) -> tuple[list[str], list[str]]:
    export_onnx(model_dir, onnx_dir)
    original = transformers.load(model_dir, slots=4)
    return answers(original), answers(onnxruntime.load(onnx_dir, slots=4))


@pytest.fixture(scope="module")
def plain(taught: Taught) -> list[str]:
    return answers(onnxruntime.load(taught.onnx_dir, slots=4))


def test_an_attention_window_survives_the_conversion(
    taught: Taught, plain: list[str], tmp_path: Path
) -> None:
    original, converted = both(
        variant(taught, tmp_path / "hf", sliding_window=24), tmp_path / "onnx"
    )
    assert converted == original
    assert converted != plain, "the window had no effect: the test proves nothing"


def test_long_rope_survives_the_conversion(
    taught: Taught, plain: list[str], tmp_path: Path
) -> None:
    half = 64 // 4 // 2
    rope = {
        "type": "longrope",
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [1.0 + 0.5 * n for n in range(half)],
        "original_max_position_embeddings": 48,
        "factor": 512 / 48,
        "partial_rotary_factor": 1.0,
    }
    model_dir = variant(
        taught,
        tmp_path / "hf",
        rope_parameters=rope,
        rope_scaling=rope,
        original_max_position_embeddings=48,
    )
    original, converted = both(model_dir, tmp_path / "onnx")
    assert converted == original
    alone = onnxruntime.load(tmp_path / "onnx", slots=1)
    assert converted == answers(alone), "rows beyond the switch disturbed each other"
    assert converted != plain, "LongRoPE had no effect: the test proves nothing"
