"""Loads the engine that the settings ask for, and says which and why."""

from __future__ import annotations

import logging
import time
from typing import TypeVar

from ..engine import choose_engine
from ..errors import MissingExtraError, UsageError
from .config import ServerConfig
from .engines.base import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")


def load_engine(config: ServerConfig, *, upstream_key: str | None = None) -> Engine:
    """Load the engine that the settings ask for. Heavy packages are imported only here."""
    # Chosen by what is installed and whether there is a GPU; what the folders hold comes after it.
    name, reason = choose_engine(config.engine)
    if name == "onnxruntime" and config.engine == "auto" and config.onnx_dir is None:
        name, reason = "transformers", "the model has not been converted to ONNX"
    logger.info("engine %s: %s", name, reason)
    started = time.monotonic()
    slots, threads = config.max_concurrent_requests_per_instance, config.num_threads
    engine: Engine
    try:
        if name == "upstream":
            from .engines.upstream import Upstream

            url = _needed(config.upstream_url, "upstream_url", name)
            engine = Upstream(url, config.upstream_model, upstream_key)
        elif name == "onnxruntime":
            from .engines import onnxruntime

            folder = _needed(config.onnx_dir, "onnx_dir", name)
            engine = onnxruntime.load(folder, slots=slots, num_threads=threads)
        elif config.adapters:
            from .engines import adapters

            engine = adapters.load(
                _needed(config.base_dir, "base_dir", name),
                _needed(config.adapter_dir, "adapter_dir", name),
                config.adapters,
                own_names=(config.model_name, config.deployment),
                slots=slots,
                num_threads=threads,
            )
        else:
            from .engines import transformers

            folder = _needed(config.model_dir, "model_dir", name)
            engine = transformers.load(folder, slots=slots, num_threads=threads)
    except ImportError as error:
        raise MissingExtraError(error.name or name, "local") from None
    logger.info("engine ready in %.1f s", time.monotonic() - started)
    return engine


def _needed(value: T | None, setting: str, engine: str) -> T:
    if value is None:
        raise UsageError(f"The engine {engine} needs the setting {setting}")
    return value
