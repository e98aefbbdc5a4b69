"""The `onnxruntime` engine: an ONNX folder made by ONNX Runtime GenAI's builder, on the CPU.

Reads model.onnx, genai_config.json and the chat format files. Tokens come from `ChatFormat`,
never from the library's own tokenizer, whose ids differ for some Phi-3 tokenizers.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ...errors import StageError
from .batch import Logits, StepModel
from .tokens import TokenEngine, chat_format

logger = logging.getLogger(__name__)

# Below this size threads cost more than they bring.
_SMALL_MODEL_BYTES = 64 * 2**20
# Tokens by which the buffer grows: each growth copies it, and needs new bindings.
_LENGTH_STEP = 64
# The library's own errors share no base class but Exception.
_ORT_ERRORS = (
    RuntimeError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def load(onnx_dir: Path, *, slots: int, num_threads: int | None = None) -> TokenEngine:
    """Load the folder; raises StageError when it is not a converted model."""
    model = step_model(onnx_dir, num_threads)
    return TokenEngine.of_folder("onnxruntime", onnx_dir, model, slots=slots)


def step_model(onnx_dir: Path, num_threads: int | None = None) -> StepModel:
    """The folder's graph, ready to step; raises StageError when it is not a converted model."""
    try:
        config = json.loads((onnx_dir / "genai_config.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError):
        raise StageError(
            f"{onnx_dir} is not a converted model (no readable genai_config.json); "
            "convert the tuned model again with: phi3 deploy"
        ) from None
    chat = chat_format(onnx_dir)
    threads = num_threads or threads_for(onnx_dir)
    try:
        model = BatchedSession(onnx_dir, config["decoder"], threads)
        # One token now: a model that the library cannot run fails before it is served.
        model.add([chat.pad_token_id], 2)
        model.reset()
    except _ORT_ERRORS as error:
        raise StageError(
            f"ONNX Runtime cannot run the model in {onnx_dir}: {error}. "
            "Serve it with the setting serve.engine=transformers"
        ) from None
    return model


def threads_for(onnx_dir: Path) -> int:
    """One thread for a small model, or one for each core of the machine."""
    # All files: weights lie in model.onnx, model.onnx.data or model.int8.data, by precision.
    size = sum(file.stat().st_size for file in onnx_dir.iterdir() if file.is_file())
    if size < _SMALL_MODEL_BYTES:
        return 1
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


class BatchedSession:
    """All rows in one key/value buffer, moved by one `session.run` per step.

    The graph's attention reads each row up to its own length, so rows of any age share a batch;
    it writes new keys and values in place, because past and present are the same memory.
    Logits are valid until the next call: they are in the graph's own output buffer.
    """

    def __init__(self, onnx_dir: Path, decoder: dict[str, Any], threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # A server waits most of the time; spinning threads would burn a neighbour's core.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = onnx_dir / decoder["filename"]
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        layers = int(decoder["num_hidden_layers"])
        self._names = [
            (decoder["inputs"][f"past_{kind}_names"] % n, decoder["outputs"][out] % n)
            for kind, out in (("key", "present_key_names"), ("value", "present_value_names"))
            for n in range(layers)
        ]
        types = {value.name: value.type for value in self._session.get_inputs()}
        self._dtype = _DTYPES[types[self._names[0][0]]]
        self._heads, self._size = int(decoder["num_key_value_heads"]), int(decoder["head_size"])
        item = np.dtype(self._dtype).itemsize
        self._token_bytes = len(self._names) * self._heads * self._size * item
        # Half of what is free now: while the buffer grows, the old and the new one both exist.
        self._memory: int = psutil.virtual_memory().available // 2
        self._buffers: list[np.ndarray[Any, Any]] = []
        self._lengths: list[int] = []
        self._reserved: list[int] = []
        # Lengths of the rows whose prompts are being read, in separate memory.
        self._open: list[int] = []
        # Of `step`, for that many rows: binding dozens of buffers again costs more than a small
        # model's step.
        self._binding: tuple[int, Any] | None = None

    def has_room(self, length: int) -> bool:
        """Whether the buffer can grow to hold one more row of `length` tokens."""
        return self._fits(*self._wanted(length))

    def add(self, ids: Sequence[int], length: int) -> Logits:
        """Append a row and read its prompt."""
        self._grow(*self._wanted(length))
        row = len(self._lengths)
        self._lengths.append(len(ids))
        self._reserved.append(length)
        prompt = np.array([ids], np.int64)
        binding = self._bind([buffer[row : row + 1] for buffer in self._buffers])
        logits: Logits = self._run(binding, prompt, np.ones_like(prompt))[0]
        return logits

    def add_in_parts(
        self, ids: Sequence[int], length: int, part: int
    ) -> Generator[Logits | None, None, None]:
        """See `batch.PartwiseModel`. Read into separate memory, copied to the rows at the end."""
        # Not in the rows' buffer, which `step` moves between two parts.
        own = [self._zeros(1, len(ids)) for _ in self._names]
        self._open.append(length)
        try:
            binding = self._bind(own)
            for start in range(0, len(ids), part):
                prompt = np.array([ids[start : start + part]], np.int64)
                seen = np.ones((1, start + prompt.shape[1]), np.int64)
                logits = self._run(binding, prompt, seen)
                if seen.shape[1] < len(ids):
                    yield None
        finally:
            self._open.remove(length)
        self._grow(*self._wanted(length))
        row = len(self._lengths)
        for buffer, read in zip(self._buffers, own, strict=True):
            buffer[row, :, : len(ids)] = read[0]
        self._lengths.append(len(ids))
        self._reserved.append(length)
        yield logits[0]

    def step(self, tokens: Sequence[int]) -> Logits:
        """Append one token to every row."""
        rows = len(tokens)
        if self._binding is None or self._binding[0] != rows:
            self._binding = (rows, self._bind([buffer[:rows] for buffer in self._buffers]))
        self._lengths = [length + 1 for length in self._lengths]
        lengths = np.array(self._lengths)
        # Ones up to each row's own length, the new token included: padding is on the right.
        mask = (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)
        return self._run(self._binding[1], np.array(tokens, np.int64)[:, None], mask)

    def drop(self, row: int) -> None:
        """Remove a row; the last one moves into its place."""
        last, length = len(self._lengths) - 1, self._lengths[-1]
        if row != last:
            for buffer in self._buffers:
                buffer[row, :, :length] = buffer[last, :, :length]
        self._lengths[row], self._reserved[row] = self._lengths[-1], self._reserved[-1]
        self._lengths.pop()
        self._reserved.pop()

    def reset(self) -> None:
        """Remove all rows and give their memory back."""
        self._lengths, self._reserved = [], []
        self._buffers, self._binding = [], None

    def _wanted(self, length: int) -> tuple[int, int]:
        longest = max([*self._reserved, *self._open, length])
        return len(self._reserved) + len(self._open) + 1, -(-longest // _LENGTH_STEP) * _LENGTH_STEP

    def _grow(self, rows: int, longest: int) -> None:
        have_rows, _, have_length, _ = self._buffers[0].shape if self._buffers else (0, 0, 0, 0)
        # Nobody is left and the next one needs less than half: one long answer must not keep its
        # memory for ever.
        if not self._reserved and have_length > 2 * longest:
            self.reset()
            have_rows = have_length = 0
        if rows <= have_rows and longest <= have_length:
            return
        if rows > have_rows:
            rows = max(rows, 2 * have_rows if self._fits(2 * have_rows, longest) else rows)
        rows, longest = max(rows, have_rows), max(longest, have_length)
        used = len(self._reserved)
        for index in range(len(self._names)):
            # zeros: pages that no row reaches cost no memory.
            buffer = self._zeros(rows, longest)
            if used:
                buffer[:used, :, :have_length] = self._buffers[index][:used]
            self._buffers[index : index + 1] = [buffer]
        self._binding = None

    def _fits(self, rows: int, longest: int) -> bool:
        return rows * longest * self._token_bytes <= self._memory

    def _zeros(self, rows: int, length: int) -> np.ndarray[Any, Any]:
        return np.zeros((rows, self._heads, length, self._size), self._dtype)

    def _bind(self, buffers: list[np.ndarray[Any, Any]]) -> Any:
        """Keys and values of some rows, one array for each name."""
        binding = self._session.io_binding()
        binding.bind_output("logits", "cpu")
        for (past, present), buffer in zip(self._names, buffers, strict=True):
            shape, at = buffer.shape, buffer.ctypes.data
            binding.bind_input(past, "cpu", 0, self._dtype, shape, at)
            binding.bind_output(present, "cpu", 0, self._dtype, shape, at)
        return binding

    def _run(self, binding: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any]) -> Logits:
        for name, value in (("input_ids", ids), ("attention_mask", mask)):
            at = value.ctypes.data
            binding.bind_input(name, "cpu", 0, np.int64, value.shape, at)
        self._session.run_with_iobinding(binding)
        # The graph gives the last position alone (prune_lm_head, see export.py).
        logits: Logits = binding.get_outputs()[0].numpy()[:, -1].astype(np.float32, copy=False)
        return logits
