"""Converts a model folder to the ONNX folder that the `ort-genai` engine serves.

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
from pathlib import Path
from typing import Any, Literal

from ..errors import MissingExtraError, StageError
from ..quiet import captured_output

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "int8", "int4"]

# Builder options: only the last position's logits are ever read; no look into the user's
# Hugging Face login; attention windows inside the graph, because our batch keeps whole rows.
_OPTIONS = ("prune_lm_head=true", "hf_token=false", "windowed_kv_cache=false")
# What ChatFormat reads, and what other programs expect beside it: byte for byte the originals.
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
            f"{model_dir} is not a model folder (no config.json); make one with: phi3 train"
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
            _to_int8(built)
        for name in _COPIED:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, built / name)
        _replace(out_dir, built, Path(scratch) / "old")
    size = sum(file.stat().st_size for file in out_dir.iterdir())
    seconds = round(time.monotonic() - started, 2)
    logger.info("converted %s to %s (%s, %d bytes)", model_dir, out_dir, precision, size)
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
                        "Serve it without conversion with: serve.engine=transformers"
                    )


def _build(model_dir: Path, out_dir: Path, precision: Precision, *, cache: Path) -> None:
    said = io.StringIO()
    try:
        with captured_output(said):
            from onnxruntime_genai.models import builder

            common = ("", str(model_dir), str(out_dir), precision, "cpu", str(cache))
            options = builder.parse_extra_options(*common, list(_OPTIONS))
            _mark_windows(options["hf_details"]["hf_config"])
            builder.create_model(*common, **options)
    except ImportError as error:
        raise MissingExtraError(error.name or "onnxruntime-genai", "local") from None
    except Exception as error:
        # The builder raises whatever its parts raise, plain Exception included.
        logger.debug("the builder said:\n%s", said.getvalue(), exc_info=True)
        raise StageError(
            f"{model_dir} could not be converted to ONNX: {type(error).__name__}: {error}. "
            "Serve it without conversion with: serve.engine=transformers"
        ) from None


def _to_int8(folder: Path) -> None:
    from .int8 import to_int8

    to_int8(folder)


def _mark_windows(config: Any) -> None:
    """Say which layers attend to a window: all of them, where Phi-3's configuration has one.

    The builder looks only at `layer_types`, which Phi-3 does not have, and would leave it out.
    """
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers


def _replace(target: Path, new: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    new.rename(target)
