"""Prompt flow's own server for a flow, with the connection out of the environment.

Reads PHI3_ENDPOINT, PHI3_KEY and what else PHI3_* names; asks no connection store and no keyring.
`pf flow serve` starts the same server, but always asks its store for the connection.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Literal

from phi3_tool import ConnectionSettings

from . import promptflow_store
from .errors import MissingExtraError, UsageError

Engine = Literal["flask", "fastapi"]
# Prompt flow asks what is set in the process where its own provider has no name.
_NO_STORE = {"connection.provider": ""}


def serve_flow(flow: Path, *, host: str, port: int, engine: Engine) -> None:
    """Serve the flow in this process until it is interrupted."""
    if not (flow / "flow.dag.yaml").is_file():
        raise UsageError(f"{flow} is not a flow: expected a flow.dag.yaml in it")
    settings = ConnectionSettings.from_environment()
    os.environ.setdefault("PF_LOGGING_LEVEL", "ERROR")
    promptflow_store.quiet()
    provider = _module("promptflow.core._connection_provider._connection_provider")
    provider.ConnectionProvider._instance = _provider(settings)
    # Prompt flow 1.18.5 forgot this import: without it flask's page at / answers 400.
    _module("promptflow.core._serving.v1.blueprint.static_web_blueprint").os = os
    _module("promptflow._sdk._utilities.serve_utils").start_flow_service(
        source=flow, host=host, port=port, config=_NO_STORE, engine=engine, skip_open_browser=True
    )


def _provider(settings: ConnectionSettings) -> Any:
    """Hands the environment's endpoint to whatever connection a flow names."""
    value = {
        name: str(given)
        for name in ("endpoint", "key", "deployment", "dialect", "context_length")
        if (given := getattr(settings, name)) is not None
    }
    dicts = _module("promptflow.core._connection_provider._dict_connection_provider")

    class Environment(dicts.DictConnectionProvider):  # type: ignore[misc,name-defined]
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

    return Environment({})


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "promptflow", "flow") from None
