"""Chooses the engine for `engine: auto`, and says why; loads the chosen one.

Looks at what is installed and whether there is a GPU, without importing torch for it.
"""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from ..errors import MissingExtraError, UsageError
from .config import EngineName, ServerConfig
from .engines.base import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GPU_MARKS = ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version")


def choose_engine(asked: EngineName = "auto") -> tuple[EngineName, str]:
    """The engine to take and the reason, fit for `engine X: REASON`."""
    if asked != "auto":
        return asked, "set in the recipe"
    if has_gpu():
        return "transformers", "there is an NVIDIA GPU"
    missing = [name for name in ("onnxruntime", "onnxruntime_genai") if not find_spec(name)]
    if missing:
        return "transformers", f"{missing[0]} is not installed"
    return "ort-genai", "no GPU, and ONNX Runtime is the fastest on a CPU"


def has_gpu() -> bool:
    """Whether torch can use an NVIDIA GPU here; imports torch only where there seems to be one."""
    if not find_spec("torch") or not any(Path(mark).exists() for mark in _GPU_MARKS):
        return False
    import torch

    return bool(torch.cuda.is_available())


def load_engine(config: ServerConfig, *, upstream_key: str | None = None) -> Engine:
    """Load the engine that the settings ask for. Heavy packages are imported only here."""
    name, reason = choose_engine(config.engine)
    if name == "ort-genai" and config.engine == "auto" and config.onnx_dir is None:
        name, reason = "transformers", "the model has not been converted to ONNX"
    logger.info("engine %s: %s", name, reason)
    started = time.monotonic()
    try:
        engine = _load(name, config, upstream_key)
    except ImportError as error:
        raise MissingExtraError(error.name or name, "local") from None
    logger.info("engine ready in %.1f s", time.monotonic() - started)
    return engine


def _load(name: EngineName, config: ServerConfig, upstream_key: str | None) -> Engine:
    slots, threads = config.max_concurrent_requests_per_instance, config.num_threads
    if name == "upstream":
        from .engines.upstream import Upstream

        url = _needed(config.upstream_url, "upstream_url", name)
        return Upstream(url, config.upstream_model, upstream_key)
    if name == "ort-genai":
        from .engines import ort_genai

        folder = _needed(config.onnx_dir, "onnx_dir", name)
        return ort_genai.load(folder, slots=slots, num_threads=threads)
    if config.adapters:
        return _load_adapters(config)
    from .engines import transformers

    folder = _needed(config.model_dir, "model_dir", name)
    return transformers.load(folder, slots=slots, num_threads=threads)


def _load_adapters(config: ServerConfig) -> Engine:
    from .engines import adapters

    return adapters.load(
        _needed(config.base_dir, "base_dir", "transformers"),
        _needed(config.adapter_dir, "adapter_dir", "transformers"),
        config.adapters,
        own_names=(config.model_name, config.deployment),
        slots=config.max_concurrent_requests_per_instance,
        num_threads=config.num_threads,
    )


def _needed(value: T | None, setting: str, engine: str) -> T:
    if value is None:
        raise UsageError(f"The engine {engine} needs the setting {setting}")
    return value
