"""Loads the engine that the settings ask for, and says which and why."""

from __future__ import annotations

import logging
import time
from typing import TypeVar

from ..engine import EngineName, choose_engine
from ..errors import MissingExtraError, UsageError
from .config import ServerConfig
from .engines.base import Engine

logger = logging.getLogger(__name__)

T = TypeVar("T")


def load_engine(config: ServerConfig, *, upstream_key: str | None = None) -> Engine:
    """Load the engine that the settings ask for. Heavy packages are imported only here."""
    name, reason = choose_engine(config.engine)
    if name == "onnxruntime" and config.engine == "auto" and config.onnx_dir is None:
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
    if name == "onnxruntime":
        from .engines import onnxruntime

        folder = _needed(config.onnx_dir, "onnx_dir", name)
        return onnxruntime.load(folder, slots=slots, num_threads=threads)
    if config.adapters:
        from .engines import adapters

        return adapters.load(
            _needed(config.base_dir, "base_dir", "transformers"),
            _needed(config.adapter_dir, "adapter_dir", "transformers"),
            config.adapters,
            own_names=(config.model_name, config.deployment),
            slots=config.max_concurrent_requests_per_instance,
            num_threads=config.num_threads,
        )
    from .engines import transformers

    folder = _needed(config.model_dir, "model_dir", name)
    return transformers.load(folder, slots=slots, num_threads=threads)


def _needed(value: T | None, setting: str, engine: str) -> T:
    if value is None:
        raise UsageError(f"The engine {engine} needs the setting {setting}")
    return value
