"""This machine as target: trains in process, registers with MLflow, serves in the background.

Reads the run folder; writes run/onnx-<precision> and run/endpoint.log; starts one server process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from pathlib import Path

from phi3_tool.client import Phi3Client
from phi3_tool.connection import ConnectionSettings, same_endpoint
from phi3_tool.wire import DEFAULT_CONTEXT_LENGTH, to_messages

from ..engine import choose_engine
from ..errors import StageError
from ..manifests import (
    AnswerManifest,
    BaseManifest,
    ConnectionManifest,
    EndpointManifest,
    Manifest,
    MetricsManifest,
    ModelManifest,
    RegistrationManifest,
)
from ..memory import memory_plan, row_sizes, this_device
from ..models.layers import check_adapter
from ..packages import has_prompt_flow
from ..progress import Progress, no_progress, note
from ..recipe import Recipe
from ..run import Run
from ..serve import keyholder, process
from ..serve.config import ServerConfig
from ..serve.export import converted
from .base import EndpointStatus, PlanLine, RunStatus

# The chat flow's own default.
_MAX_NEW_TOKENS = 256


class LocalTarget:
    """The embedded default. The endpoint's key lives in the server and in this object only."""

    name = "local"

    def __init__(self) -> None:
        self._keys: dict[Path, str] = {}

    @property
    def cloud(self) -> None:
        """None: everything is here."""
        return None

    def begin(self, recipe: Recipe, run: Run) -> None:
        """Nothing: a run folder without a place is this machine's."""

    def plan(self, recipe: Recipe, run: Run) -> list[PlanLine]:
        """What `up` would use here, memory included; nothing is billed."""
        engine, reason = choose_engine(recipe.serve.engine, adapters=recipe.serve.adapters)
        model = "a tiny Phi-3, trained here" if recipe.model.is_tiny else recipe.model.name_or_path
        return [
            PlanLine("base", model),
            PlanLine("finetune", f"{recipe.finetune.method}, on this machine"),
            PlanLine("deploy", f"engine {engine}: {reason}"),
            *memory_plan(recipe, this_device(), row_sizes(recipe, run)),
            PlanLine("cost", f"nothing is billed; phi3 creates {run.path} and one server process"),
        ]

    def inputs(self, recipe: Recipe, stage: type[Manifest], shared: object) -> object:
        """Nothing but what every target shares."""
        del recipe, stage
        return shared

    def prepare_base(self, recipe: Recipe, run: Run, progress: Progress) -> BaseManifest:
        """Make the tiny model, or find weights."""
        from ..finetune import prepare_base

        return prepare_base(recipe, run, progress)

    def train(self, recipe: Recipe, run: Run, progress: Progress) -> ModelManifest:
        """Fine-tune in this process."""
        from ..finetune import finetune

        return finetune(recipe, run, progress)

    def evaluate(self, recipe: Recipe, run: Run, progress: Progress) -> MetricsManifest:
        """Ask both models in this process."""
        from ..evaluate import evaluate

        return evaluate(recipe, run, progress)

    def register(self, recipe: Recipe, run: Run) -> RegistrationManifest:
        """Register with MLflow in the run folder, under the run's name."""
        del recipe
        from ..register import register

        return register(run)

    def deploy(self, recipe: Recipe, run: Run, progress: Progress) -> EndpointManifest:
        """Start the endpoint of this run, on the port it had before where that is free.

        An endpoint of this run that still answers is stopped when the new one does, unless the
        recipe's port must be free first.
        """
        config, engine, reason = server_config(recipe, run, progress)
        before = run.read(EndpointManifest)
        # Else the old server goes on until the new one answers: clients see no gap.
        port_is_in_use = before is not None and before.port == config.port
        if port_is_in_use:
            self.teardown(run)
        # A key of the user's own is for clients that have it already, and for systems other than
        # Linux, where no server hands out its key.
        key = os.environ.get("PHI3_KEY") or secrets.token_urlsafe(32)
        note(progress, "waiting for the endpoint to answer")
        started = process.start(
            config,
            key=key,
            upstream_key=os.environ.get("PHI3_UPSTREAM_KEY"),
            log_path=run.file("endpoint.log"),
        )
        if not port_is_in_use:
            self.teardown(run)
        self._keys[run.path] = key
        return EndpointManifest(
            target=self.name,
            endpoint=started.endpoint,
            engine=engine,
            pid=started.pid,
            create_time=started.create_time,
            port=started.port,
            deployment=config.deployment,
            context_length=context_length(config),
            log="endpoint.log",
            choices=[f"engine {engine}: {reason}"],
        )

    def is_up(self, recipe: Recipe, run: Run) -> bool:
        """The server lives and its key is known; else only a new one has a key to connect with."""
        endpoint = run.read(EndpointManifest)
        return (
            endpoint is not None
            and _lives(endpoint)
            and self._known_key(recipe, run, endpoint) is not None
        )

    def connect(self, recipe: Recipe, run: Run, progress: Progress) -> ConnectionManifest:
        """Write the connection into Prompt flow's store on this machine."""
        from ..flow.store import connect

        del progress
        endpoint = run.require(EndpointManifest)
        key = self._known_key(recipe, run, endpoint)
        if key is None:
            raise StageError(
                "No running process holds the endpoint's key any more; restart the endpoint with: "
                "phi3 down && phi3 up"
            )
        section = recipe.connection
        return connect(endpoint, key, section.name, section.dialect, run=run.name)

    def is_connected(self, run: Run) -> bool:
        """Whether the run's own connection is in the store and leads to its endpoint."""
        from ..flow.store import read_connection

        manifest = run.require(ConnectionManifest)
        try:
            stored, _key = read_connection(manifest.own or manifest.name)
        except (
            StageError
        ):  # deleted by hand, or its keyring is gone: `connect` says so, or heals it
            return False
        return same_endpoint(stored, run.require(EndpointManifest).endpoint)

    def ask(self, flow: Path, recipe: Recipe, run: Run, progress: Progress) -> AnswerManifest:
        """The answer through the stored connection; without Prompt flow, the endpoint's own."""
        from ..data import question_of
        from ..flow.ask import ask

        del progress
        question = question_of(recipe, run)
        if not has_prompt_flow():
            settings = settings_from_server(run)
            # As the chat flow does it: room for the answer is kept free of the history.
            room = (settings.context_length or DEFAULT_CONTEXT_LENGTH) - _MAX_NEW_TOKENS
            messages = to_messages((), question, max_tokens=room)
            with Phi3Client.from_connection(settings) as client:
                reply = client.chat(
                    messages, temperature=0.0, top_p=1.0, max_new_tokens=_MAX_NEW_TOKENS
                )
            return AnswerManifest(question=question, answer=reply.text, through_flow=False)
        connection = run.require(ConnectionManifest)
        name = connection.own or connection.name
        answer = ask(flow, question, connection_name=name)
        return AnswerManifest(question=question, answer=answer)

    def _known_key(self, recipe: Recipe, run: Run, endpoint: EndpointManifest) -> str | None:
        """The endpoint's key: the server's, else of the store if that points to this endpoint."""
        from ..flow.store import StoreError, own_name, read_connection

        key = self.key(run)
        if key is not None or not has_prompt_flow():
            return key
        # The run's own connection first: the shared name may belong to another run by now.
        for name in (own_name(recipe.connection.name, run.name), recipe.connection.name):
            try:
                stored, stored_key = read_connection(name)
            except StoreError:
                continue
            if same_endpoint(stored, endpoint.endpoint):
                return stored_key
        return None

    def key(self, run: Run) -> str | None:
        """The key of the endpoint that this object started, or that the server hands out."""
        return self._keys.get(run.path) or _key_of_server(run)

    def status(self, run: Run) -> RunStatus:
        """Whether the run's server process lives."""
        endpoint = run.read(EndpointManifest)
        if endpoint is None:
            return {"endpoint": {"state": "none"}}
        state = "up" if _lives(endpoint) else "down"
        shown: EndpointStatus = {
            "state": state,
            "url": endpoint.endpoint,
            "pid": endpoint.pid,
            "engine": endpoint.engine,
        }
        return {"endpoint": shown}

    def teardown(self, run: Run) -> list[str]:
        """Stop the run's server; requests that it is answering are finished first."""
        endpoint = run.read(EndpointManifest)
        if endpoint is None or endpoint.pid is None or endpoint.create_time is None:
            return []
        if not process.stop(endpoint.pid, endpoint.create_time):
            return []
        return [f"Stopped the endpoint of {run.name}: process {endpoint.pid}"]


def settings_from_server(run: Run) -> ConnectionSettings:
    """How to reach the run's endpoint where Prompt flow's store does not say it.

    Raises StageError when no server of the run hands out its key.
    """
    endpoint = run.require(EndpointManifest)
    key = _key_of_server(run)
    if key is None:
        raise StageError(
            f"The endpoint of the run {run.name!r} does not hand out its key; restart it with: "
            f"phi3 down {run.name} && phi3 up --run {run.name}. Outside Linux, choose the key "
            "yourself and name both: PHI3_KEY=… phi3 deploy, then set PHI3_ENDPOINT and PHI3_KEY"
        )
    return ConnectionSettings(
        endpoint.endpoint,
        key,
        deployment=endpoint.deployment or None,
        dialect=endpoint.dialect,
        context_length=endpoint.context_length,
    )


def _key_of_server(run: Run) -> str | None:
    endpoint = run.read(EndpointManifest)
    if endpoint is None or endpoint.pid is None or not _lives(endpoint):
        return None
    return keyholder.ask(endpoint.pid)


def _lives(endpoint: EndpointManifest) -> bool:
    """Whether the server is the process that was started, and not a later one of its number."""
    if endpoint.pid is None or endpoint.create_time is None:
        return False
    return process.alive(endpoint.pid, endpoint.create_time)


def server_config(recipe: Recipe, run: Run, progress: Progress) -> tuple[ServerConfig, str, str]:
    """What the server needs to serve this run's model, the engine and the reason for it.

    Converts the model to ONNX if the engine needs it and that has not been done yet.
    """
    model = run.require(ModelManifest)
    engine, reason = choose_engine(recipe.serve.engine, adapters=recipe.serve.adapters)
    settings = recipe.serve.model_dump(exclude={"precision", "adapters"})
    settings["engine"] = engine
    if recipe.serve.adapters:
        # The run's own adapter, the named ones, and the base below them.
        from ..finetune.weights import list_adapters

        if model.adapter is None:
            raise StageError(
                f"The model of the run {run.name!r} was trained with method full, so no adapters "
                "can be served with it: train with finetune.method=lora, or set "
                "serve.adapters=false"
            )
        named = {adapter.name: adapter.path for adapter in list_adapters(run) if adapter.fits}
        if not named:
            raise StageError(
                f"The run {run.name!r} has no named adapter to serve; "
                "train one: phi3 train RECIPE --adapter NAME"
            )
        base = run.path / run.require(BaseManifest).path
        for folder in named.values():  # here, where its error is seen, not in the server's log
            check_adapter(folder, base)
        settings |= {
            "base_dir": base,
            "adapter_dir": run.path / model.adapter,
            "adapters": named,
        }
    settings["model_dir"] = run.path / model.path
    if engine == "onnxruntime":
        settings["onnx_dir"] = converted(run, recipe.serve.precision, progress)
    port, before = recipe.serve.port, run.read(EndpointManifest)
    if not port and before is not None and before.port:
        # That of the last endpoint, so that clients find the next one; any where it is taken.
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As the server binds: else a connection in TIME_WAIT would look like a taker.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", before.port))
            port = before.port
    settings["port"] = port
    settings["num_threads"] = recipe.finetune.num_threads
    config = ServerConfig.model_validate(settings)
    return config, engine, reason


def serve_in_front(recipe: Recipe, run: Run, key: str) -> int:
    """Serve the run's model in this process until a signal ends it."""
    from ..serve.server import log_to_stderr, serve

    log_to_stderr()  # tells where it listens
    config, _engine, _reason = server_config(recipe, run, no_progress)
    serve(config, key=key, upstream_key=os.environ.pop("PHI3_UPSTREAM_KEY", None))
    return 0


def context_length(config: ServerConfig) -> int | None:
    """How many tokens the served model takes, for those who cut the history to it."""
    from ..prompt import ChatFormat

    if config.engine == "upstream" or config.model_dir is None:
        return None
    return ChatFormat.from_folder(config.model_dir).context_length or None
