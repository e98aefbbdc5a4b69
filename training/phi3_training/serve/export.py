"""Converts a model folder to the ONNX folder that the `onnxruntime` engine serves.

Reads a Hugging Face model folder; writes model.onnx, genai_config.json and a copy of the chat
format's files. The folder appears whole or not at all; nothing is fetched.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ..errors import MissingExtraError, StageError
from ..manifests import EXPORTS, ModelManifest
from ..progress import Progress, captured_output, note
from ..run import Run

# ---- 8 bits: a float32 ONNX folder whose matrices are then multiplied as integers
#
# Reads and rewrites model.onnx and its data file, one matrix at a time. Each output column of a
# matrix has its own scale, and so has each token's vector, found while it runs: a token's numbers
# never depend on the other rows of its batch, because sums of integers are exact.
# Why not ONNX Runtime's own MatMulNBits: it multiplies eight rows in eight times the time of one
# (72 GFLOP/s on one core of a Xeon with AMX, whatever the number of rows, against 300 to 500 here).
# Why not DynamicQuantizeMatMul: one scale for all rows, so that neighbours would change an answer.

# Vectors unsigned with the zero in the middle, matrices signed: the one pairing that ONNX Runtime
# multiplies with VNNI and AMX (1.31 takes 6 times as long where both are unsigned).
_ZERO = 128
_LARGEST = 127
_DATA = "model.int8.data"
# Smaller ones stay in the graph file.
_EXTERNAL_BYTES = 1024


def to_int8(folder: Path) -> None:
    """Rewrite the folder's model.onnx, as ONNX Runtime GenAI's builder writes it in float32."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    with (folder / _DATA).open("wb") as data:
        work = _Rewriting(folder, data, {i.name: i for i in graph.initializer})
        nodes = [made for node in graph.node for made in work.rewritten(node)]
        used = {name for node in nodes for name in node.input}
        kept = [work.moved(i) for i in graph.initializer if i.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*work.made, *kept])
    onnx.save(model, folder / "model.onnx")
    (folder / "model.onnx.data").unlink()


@dataclass
class _Rewriting:
    folder: Path
    data: BinaryIO
    given: dict[str, TensorProto]
    made: list[TensorProto] = field(default_factory=list)
    # A vector is quantised once, however many matrices read it.
    _vectors: dict[str, tuple[str, str]] = field(default_factory=dict)
    _transposed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        step = np.array(1 / _LARGEST, np.float32)
        self.made.append(numpy_helper.from_array(step, "int8.step"))
        self.made.append(numpy_helper.from_array(np.array(_ZERO, np.uint8), "int8.zero"))
        self.made.append(numpy_helper.from_array(np.array([-1], np.int64), "int8.last_axis"))

    def rewritten(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that take the place of `node`."""
        if node.op_type == "MatMul" and self._is_matrix(node.input[1]):
            return self._product(node)
        if node.op_type == "Transpose" and self._is_matrix(node.input[0]):
            # The embedding of a model whose output matrix is its embedding, turned.
            self._transposed[node.output[0]] = node.input[0]
            return []
        if node.op_type == "Gather" and node.input[0] in self._transposed:
            return self._embedding(node, self._array(self._transposed[node.input[0]]).T)
        if node.op_type == "Gather" and self._is_matrix(node.input[0]):
            return self._embedding(node, self._array(node.input[0]))
        return [node]

    def moved(self, tensor: TensorProto) -> TensorProto:
        """A tensor that stays as it is, in the new data file."""
        return self._stored(tensor.name, self._array(tensor.name))

    def _product(self, node: NodeProto) -> list[NodeProto]:
        source, name = node.input[0], node.input[1]
        matrix, scales = _quantised(self._array(name), axis=0)
        self._keep(f"{name}.int8", matrix)
        self._keep(f"{name}.scales", scales.ravel())
        vector, size, before = self._vector(source)
        product, output = f"{node.output[0]}.int8", node.output[0]
        inputs = [vector, f"{name}.int8", "int8.step", f"{name}.scales", "int8.zero"]
        return [
            *before,
            helper.make_node(
                "MatMulIntegerToFloat", inputs, [product], node.name, domain="com.microsoft"
            ),
            helper.make_node("Mul", [product, size], [output], f"{node.name}/int8/Scale"),
        ]

    def _vector(self, source: str) -> tuple[str, str, list[NodeProto]]:
        """Names of the quantised vectors and of their largest values; the nodes that make them.

        A vector of zeros is divided by zero; whatever integers come of it are multiplied by its
        largest value, zero.
        """
        if source in self._vectors:
            return (*self._vectors[source], [])
        size, part, vector = (f"{source}.{kind}" for kind in ("largest", "part", "int8"))
        self._vectors[source] = vector, size
        at = f"{source}/int8"
        return (
            vector,
            size,
            [
                helper.make_node("Abs", [source], [f"{source}.abs"], f"{at}/Abs"),
                helper.make_node(
                    "ReduceMax",
                    [f"{source}.abs", "int8.last_axis"],
                    [size],
                    f"{at}/ReduceMax",
                    keepdims=1,
                ),
                helper.make_node("Div", [source, size], [part], f"{at}/Div"),
                helper.make_node(
                    "QuantizeLinear", [part, "int8.step", "int8.zero"], [vector], f"{at}/Quantize"
                ),
            ],
        )

    def _embedding(self, node: NodeProto, rows: NDArray[np.float32]) -> list[NodeProto]:
        name, ids, output = node.name, node.input[1], node.output[0]
        matrix, scales = _quantised(rows, axis=1)
        self._keep(f"{name}.int8", matrix)
        self._keep(f"{name}.scales", scales)
        return [
            helper.make_node("Gather", [f"{name}.int8", ids], [f"{output}.int8"], name),
            helper.make_node("Gather", [f"{name}.scales", ids], [f"{output}.scale"], f"{name}/S"),
            helper.make_node("Cast", [f"{output}.int8"], [f"{output}.raw"], f"{name}/C", to=1),
            helper.make_node("Mul", [f"{output}.raw", f"{output}.scale"], [output], f"{name}/M"),
        ]

    def _is_matrix(self, name: str) -> bool:
        tensor = self.given.get(name)
        return (
            tensor is not None and len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT
        )

    def _array(self, name: str) -> NDArray[Any]:
        """A tensor's values; those in the data file are mapped, not read."""
        tensor = self.given[name]
        if not tensor.external_data:
            whole: NDArray[Any] = numpy_helper.to_array(tensor)
            return whole
        place = {entry.key: entry.value for entry in tensor.external_data}
        return np.memmap(
            self.folder / place["location"],
            dtype=helper.tensor_dtype_to_np_dtype(tensor.data_type),
            mode="r",
            offset=int(place.get("offset", 0)),
            shape=tuple(tensor.dims),
        )

    def _keep(self, name: str, values: NDArray[Any]) -> None:
        self.made.append(self._stored(name, values))

    def _stored(self, name: str, values: NDArray[Any]) -> TensorProto:
        if values.nbytes < _EXTERNAL_BYTES:
            return numpy_helper.from_array(np.ascontiguousarray(values), name)
        # Aligned, so that ONNX Runtime can map it.
        self.data.write(b"\0" * (-self.data.tell() % 4096))
        tensor = TensorProto(
            name=name,
            dims=values.shape,
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        offset = self.data.tell()
        self.data.write(np.ascontiguousarray(values).data)
        for key, value in (("location", _DATA), ("offset", offset), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def _quantised(
    values: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The matrix in 8 bits, and the scales along `axis` kept as an axis of length one."""
    scales = np.abs(values).max(axis=axis, keepdims=True) / np.float32(_LARGEST)
    # Columns of zeros: a scale of 0 would make them 0/0.
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    return np.rint(values / scales).astype(np.int8), scales.astype(np.float32)


# ---- the conversion


def converted(run: Run, precision: Precision, progress: Progress) -> Path:
    """The run's model as an ONNX folder, ready for the `onnxruntime` engine.

    Converted when it is not there yet for exactly this model. Reads run/model; writes
    run/onnx-<precision> and export-onnx-<precision>.json.
    """
    model = run.require(ModelManifest)
    name = f"onnx-{precision}"
    folder = run.path / name
    kind = EXPORTS[name]
    done = run.read(kind)
    is_same = done is not None and (done.of, done.precision) == (model.done_id, precision)
    if not folder.is_dir() or not is_same:
        note(progress, f"converting the model to ONNX ({precision})")
        made = export_onnx(run.path / model.path, folder, precision)
        run.write(kind.model_validate({**made, "of": model.done_id, "path": name}))
    return folder


logger = logging.getLogger(__name__)

Precision = Literal["fp32", "int8", "int4"]

# Builder options: only the last position's logits are ever read; no look into the user's
# Hugging Face login; attention windows inside the graph, because our batch keeps whole rows.
_OPTIONS = ("prune_lm_head=true", "hf_token=false", "windowed_kv_cache=false")
# What ChatFormat reads, and what other programs expect next to it: byte for byte the originals.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def export_onnx(model_dir: Path, out_dir: Path, precision: Precision = "fp32") -> dict[str, Any]:
    """Convert `model_dir` to `out_dir`, replacing what was there.

    Returns path, precision, bytes, seconds. Raises StageError with the builder's last words, or
    for a model whose layers the builder would mistake for its output matrix.
    """
    if not (model_dir / "config.json").is_file():
        raise StageError(
            f"{model_dir} is not a model folder (no config.json); train a model with: phi3 train"
        )
    _refuse_twin_of_the_head(model_dir)
    started = time.monotonic()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as scratch:
        built = Path(scratch) / "built"
        # The builder's own int8 is MatMulNBits, as slow for many rows as its int4: see `int8`.
        written: Precision = "fp32" if precision == "int8" else precision
        _build(model_dir, built, written, cache=Path(scratch) / "cache")
        if precision == "int8":
            to_int8(built)
        for name in _COPIED:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, built / name)
        # Two renames, so that the folder's name never leads to half a model.
        if out_dir.exists():
            out_dir.rename(Path(scratch) / "old")
        built.rename(out_dir)
    size = sum(file.stat().st_size for file in out_dir.iterdir())
    seconds = round(time.monotonic() - started, 2)
    logger.debug("converted %s to %s (%s, %d bytes)", model_dir, out_dir, precision, size)
    return {"path": str(out_dir), "precision": precision, "bytes": size, "seconds": seconds}


def _refuse_twin_of_the_head(model_dir: Path) -> None:
    """Raise StageError for a model with a layer matrix of as many outputs as the vocabulary.

    The builder (onnxruntime-genai 0.18) takes every such matrix for the output matrix and writes
    a graph whose scores are garbage, without an error. No published Phi has one.
    """
    from safetensors import safe_open

    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    vocabulary = config.get("vocab_size")
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                shape = weights.get_slice(name).get_shape()
                if ".layers." in name and len(shape) == 2 and shape[0] == vocabulary:
                    raise StageError(
                        f"{model_dir} cannot be converted to ONNX: {name} has {shape[0]} outputs, "
                        "as many as the vocabulary has tokens, so the converter would take it for "
                        "the output matrix and the answers would be garbage. "
                        "Serve it unconverted with: serve.engine=transformers"
                    )


def _build(model_dir: Path, out_dir: Path, precision: Precision, *, cache: Path) -> None:
    said = io.StringIO()
    try:
        with captured_output(said):  # it prints a page about each layer
            from onnxruntime_genai.models import builder

            common = ("", str(model_dir), str(out_dir), precision, "cpu", str(cache))
            options = builder.parse_extra_options(*common, list(_OPTIONS))
            config = options["hf_details"]["hf_config"]
            # Say which layers attend to a window: all of them, where the configuration has one.
            # The builder looks only at `layer_types`, which Phi-3 does not have.
            if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
                config.layer_types = ["sliding_attention"] * config.num_hidden_layers
            builder.create_model(*common, **options)
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime-genai", "local") from None
    except Exception as error:
        # The builder raises whatever its parts raise, plain Exception included.
        logger.debug("the builder printed:\n%s", said.getvalue(), exc_info=True)
        raise StageError(
            f"{model_dir} could not be converted to ONNX: {type(error).__name__}: {error}. "
            "Serve it unconverted with: serve.engine=transformers"
        ) from None
