"""Prompt flow's own server for a flow, with the connection out of the environment.

Reads PHI3_ENDPOINT, PHI3_KEY and what else PHI3_* names; asks no connection store and no keyring.
`pf flow serve` starts the same server, but always asks its store for the connection.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any, Literal

from phi3_tool.connection import ConnectionSettings
from phi3_tool.promptflow_fixes import let_the_page_leave_defaults_out

from ..errors import MissingExtraError, StageError, UsageError
from . import store

Engine = Literal["flask", "fastapi"]
# Prompt flow asks what is set in the process where its own provider has no name.
_NO_STORE = {"connection.provider": ""}
_NAME = "PHI3_FLOW_NAME"  # for the workers, which see the flow's copy alone
# Who sets one of these collects traces of the service.
_TRACED = (
    "APPLICATIONINSIGHTS_CONNECTION_STRING",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_TRACES_EXPORTER",
)


def serve_flow(flow: Path, *, host: str, port: int, engine: Engine, workers: int = 1) -> None:
    """Serve the flow until interrupted: in this process, or in `workers` processes.

    Raises UsageError for a folder without a flow and for workers that flask cannot have;
    ConfigurationError for an environment without a usable endpoint and key; StageError for a flow
    that Prompt flow cannot load, or a port that is taken.
    """
    if not (flow / "flow.dag.yaml").is_file():
        raise UsageError(f"{flow} is not a flow: expected a flow.dag.yaml in it")
    if workers < 1:
        raise UsageError(f"--workers {workers}: expected 1 or more")
    if workers > 1 and engine != "fastapi":
        raise UsageError(
            "With flask, Prompt flow's server is one process: use --engine fastapi, or `phi3 flow "
            "image`, whose server has a worker for each core"
        )
    # Loading a flow takes seconds: look first whether it can be served there at all.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name != "nt":  # there it would accept a port that is in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StageError(
                f"The flow cannot be served at {host}:{port} ({error.strerror}): stop the program "
                f"that uses the port, or choose another --port"
            ) from None
    os.environ[_NAME] = flow.resolve().name
    _prepare()
    refused = _module("promptflow.exceptions").PromptflowException
    try:
        if workers > 1:
            uvicorn = _module("uvicorn")
            operations = _module("promptflow._sdk.operations").FlowOperations
            # A copy of the flow with its includes in it, which lives as long as the server.
            with operations._resolve_additional_includes(flow / "flow.dag.yaml") as definition:
                os.environ["PROMPTFLOW_PROJECT_PATH"] = str(Path(definition).parent.absolute())
                # A flow that cannot be loaded fails here: uvicorn starts its workers for ever.
                asgi_app()
                uvicorn.run(
                    f"{__name__}:asgi_app",
                    factory=True,
                    host=host,
                    port=port,
                    workers=workers,
                    access_log=False,
                    log_config=None,
                )
        else:
            # Prompt flow 1.18.5 forgot this import: without it flask's page at / answers 400.
            _module("promptflow.core._serving.v1.blueprint.static_web_blueprint").os = os
            _module("promptflow._sdk._utilities.serve_utils").start_flow_service(
                source=flow,
                host=host,
                port=port,
                config=_NO_STORE,
                engine=engine,
                skip_open_browser=True,
            )
    except refused as error:  # a fault of the flow, in Prompt flow's words
        raise StageError(f"The flow {flow} cannot be served: {error}") from None


def asgi_app() -> Any:
    """The flow in PROMPTFLOW_PROJECT_PATH as an ASGI application; each worker makes its own."""
    _prepare()
    os.chdir(os.environ["PROMPTFLOW_PROJECT_PATH"])
    create_app = _module("promptflow.core._serving.app").create_app
    return create_app(engine="fastapi", connection_provider="", environment_variables={})


def _prepare() -> None:
    """Quiet, and with the connection out of the environment, before a flow is loaded."""
    settings = ConnectionSettings.from_environment()
    # Before Prompt flow is imported: it reads the level then, and a user's own level stays.
    os.environ.setdefault("PF_LOGGING_LEVEL", "ERROR")
    leave_traces_out()
    store.quiet()
    _module("promptflow.core._serving.app_base")
    let_the_page_leave_defaults_out(os.environ.get(_NAME, ""))
    value = {
        name: str(given)
        for name in ("endpoint", "key", "deployment", "dialect", "context_length")
        if (given := getattr(settings, name)) is not None
    }
    dicts = _module("promptflow.core._connection_provider._dict_connection_provider")

    class Environment(dicts.DictConnectionProvider):  # type: ignore[misc,name-defined]
        """Hands the environment's endpoint to whatever connection a flow names."""

        def get(self, name: str) -> Any:
            return self._build_connection(
                {
                    "name": name,
                    "type": "CustomConnection",
                    "module": "promptflow.connections",
                    "value": dict(value),
                    "secret_keys": ["key"],
                }
            )

    provider = _module("promptflow.core._connection_provider._connection_provider")
    # A private attribute, but the one way that works without a store (promptflow 1.18.5).
    provider.ConnectionProvider._instance = Environment({})


def leave_traces_out() -> None:
    """Turn tracing off if no traces are collected: they cost a sixth of its CPU time.

    Prompt flow turns them on where it can import OpenTelemetry's instrumentation, which comes
    with the extra `azure`, and leaves them off where it cannot.
    """
    if any(os.environ.get(name) for name in _TRACED):
        return
    for engine in ("flask", "fastapi"):
        sys.modules.setdefault(f"opentelemetry.instrumentation.{engine}", None)  # type: ignore[arg-type]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "promptflow", "flow") from None
