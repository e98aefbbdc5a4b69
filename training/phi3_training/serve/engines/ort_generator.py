"""One ONNX Runtime GenAI generator per answer, stepped in turn: for models whose rows must not
share a batch (LongRoPE). Reads the converted model's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from .sampling import Logits


class Generators:
    """A step model made of independent generators; see `batch.StepModel`."""

    def __init__(self, onnx_dir: Path) -> None:
        self._model = og.Model(str(onnx_dir))
        self._rows: list[Any] = []

    def has_room(self, length: int) -> bool:  # noqa: ARG002 - the protocol's signature
        """Each generator allocates its own memory; the number of slots is the limit."""
        return True

    def add(self, ids: Sequence[int], length: int) -> Logits:
        """Append a generator and read its prompt."""
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, do_sample=False)
        generator = og.Generator(self._model, parameters)
        self._rows.append(generator)
        return self._advance(generator, ids)

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to every generator, one after the other."""
        rows = zip(self._rows, tokens, strict=True)
        return np.stack([self._advance(generator, [token]) for generator, token in rows])

    def drop(self, row: int) -> None:
        """Remove a generator; the last one takes its place."""
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def reset(self) -> None:
        """Remove all generators."""
        self._rows = []

    @staticmethod
    def _advance(generator: Any, ids: Sequence[int]) -> Logits:
        generator.append_tokens(np.array(ids, np.int32))
        logits: Logits = generator.get_logits()[0, -1].astype(np.float32)
        return logits
