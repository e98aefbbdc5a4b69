"""This machine as target: trains in process, registers with MLflow, serves in the background.

Reads the run folder; writes run/onnx-<precision> and run/endpoint.log; starts one server process.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Any

from ..console import ProgressCallback
from ..errors import StageError
from ..memory import memory_plan, row_sizes, this_device
from ..recipe import Recipe
from ..run import Run
from ..serve import process
from ..serve.choice import choose_engine
from ..serve.config import EngineName, ServerConfig
from ..serve.export import converted
from .base import Manifest, PlanLine


class LocalTarget:
    """The embedded default. The endpoint's key lives in the server and in this object only."""

    name = "local"

    def __init__(self) -> None:
        self._keys: dict[Path, str] = {}

    def begin(self, recipe: Recipe, run: Run) -> None:
        """Nothing: a run folder without a place is this machine's."""

    def plan(self, recipe: Recipe, run: Run) -> list[PlanLine]:
        """What `up` would use here, memory included; nothing is billed."""
        engine, reason = _engine(recipe)
        model = "a tiny Phi-3, trained here" if recipe.model.is_tiny else recipe.model.name_or_path
        return [
            PlanLine("base", model),
            PlanLine("finetune", f"{recipe.finetune.method}, on this machine"),
            PlanLine("deploy", f"engine {engine}: {reason}"),
            *memory_plan(recipe, this_device(), row_sizes(recipe, run)),
            PlanLine("cost", f"nothing is billed; phi3 creates {run.path} and one server process"),
        ]

    def train(self, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
        """Fine-tune in this process."""
        from ..finetune import finetune

        return finetune(recipe, run, progress)

    def register(self, recipe: Recipe, run: Run) -> Manifest:
        """Register with MLflow in the run folder."""
        from ..register import register

        return register(recipe.name, run)

    def deploy(self, recipe: Recipe, run: Run, progress: ProgressCallback) -> Manifest:
        """Start the endpoint of this run, on the port it had before where that is free.

        An endpoint of this run that still answers is stopped when the new one does, unless the
        recipe's port must be free first.
        """
        config, engine, reason = server_config(recipe, run, progress)
        before = run.manifest("endpoint")
        port_is_in_use = before is not None and before["port"] == config.port
        if port_is_in_use:
            self.teardown(run)
        key = os.environ.get("PHI3_KEY") or secrets.token_urlsafe(32)
        progress(0, 0, "waiting for the endpoint to answer")
        started = process.start(
            config,
            key=key,
            upstream_key=os.environ.get("PHI3_UPSTREAM_KEY"),
            log_path=run.file("endpoint.log"),
        )
        if not port_is_in_use:
            self.teardown(run)
        self._keys[run.path] = key
        return {
            "target": self.name,
            "endpoint": started.endpoint,
            "engine": engine,
            "pid": started.pid,
            "create_time": started.create_time,
            "port": started.port,
            "deployment": config.deployment,
            "context_length": context_length(config),
            "log": "endpoint.log",
            "choices": [f"engine {engine}: {reason}"],
        }

    def key(self, run: Run) -> str | None:
        """The key of the endpoint that this object started."""
        return self._keys.get(run.path)

    def status(self, run: Run) -> Manifest:
        """Whether the run's server process lives."""
        endpoint = run.manifest("endpoint")
        if endpoint is None:
            return {"endpoint": {"state": "none"}}
        up = process.alive(endpoint["pid"], endpoint["create_time"])
        shown = {"url": endpoint["endpoint"], "pid": endpoint["pid"], "engine": endpoint["engine"]}
        return {"endpoint": {"state": "up" if up else "down", **shown}}

    def teardown(self, run: Run) -> list[str]:
        """Stop the run's server; requests that it is answering are finished first."""
        endpoint = run.manifest("endpoint")
        if endpoint is None or not process.stop(endpoint["pid"], endpoint["create_time"]):
            return []
        return [f"Stopped the endpoint of {run.name}: process {endpoint['pid']}"]


def server_config(
    recipe: Recipe, run: Run, progress: ProgressCallback
) -> tuple[ServerConfig, str, str]:
    """What the server needs to serve this run's model, the engine and the reason for it.

    Converts the model to ONNX if the engine needs it and that has not been done yet.
    """
    model = run.require("model", "phi3 train")
    engine, reason = _engine(recipe)
    settings = recipe.serve.model_dump(exclude={"precision", "adapters"})
    settings["engine"] = engine
    if recipe.serve.adapters:
        settings.update(_adapters(run, model))
    settings["model_dir"] = run.path / model["path"]
    if engine == "ort-genai":
        settings["onnx_dir"] = converted(run, recipe.serve.precision, progress)
    before = run.manifest("endpoint") or {}
    settings["port"] = recipe.serve.port or _free_again(before.get("port", 0))
    settings["num_threads"] = recipe.finetune.num_threads
    config = ServerConfig.model_validate(settings)
    return config, engine, reason


def _engine(recipe: Recipe) -> tuple[EngineName, str]:
    if recipe.serve.adapters:
        return "transformers", "it serves the run's adapters by name"
    return choose_engine(recipe.serve.engine)


def _adapters(run: Run, model: Manifest) -> dict[str, Any]:
    """The run's own adapter, the named ones, and the base below them."""
    from ..finetune.weights import list_adapters

    if model.get("adapter") is None:
        raise StageError(
            f"The model of the run {run.name!r} was trained with method full, so no adapters can "
            f"be served with it: train with finetune.method=lora, or set serve.adapters=false"
        )
    named = {adapter.name: adapter.path for adapter in list_adapters(run) if adapter.fits}
    if not named:
        raise StageError(
            f"The run {run.name!r} has no named adapter to serve; "
            "train one: phi3 train RECIPE --adapter NAME"
        )
    base = run.path / str(run.require("base", "phi3 train")["path"])
    return {"base_dir": base, "adapter_dir": run.path / model["adapter"], "adapters": named}


def serve_in_front(recipe: Recipe, run: Run, key: str) -> int:
    """Serve the run's model in this process until a signal ends it."""
    from ..serve.server import log_to_stderr, serve

    log_to_stderr()  # tells where it listens
    config, _engine, _reason = server_config(recipe, run, lambda _done, _total, _text: None)
    serve(config, key=key, upstream_key=os.environ.pop("PHI3_UPSTREAM_KEY", None))
    return 0


def context_length(config: ServerConfig) -> int | None:
    """How many tokens the served model takes, for those who cut the history to it."""
    from ..prompt import ChatFormat

    if config.engine == "upstream" or config.model_dir is None:
        return None
    return ChatFormat.from_folder(config.model_dir).context_length or None


def _free_again(port: int) -> int:
    """The port of the last endpoint, so that clients find the next one; 0 when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port
