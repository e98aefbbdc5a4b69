"""Asks the chat flow one question through Prompt flow, inside this process.

Reads the flow folder and the connection (PHI3_ENDPOINT and PHI3_KEY, else Prompt flow's store);
writes nothing into the flow folder, starts no service, sends no telemetry.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_tool.connection import ConnectionSettings, environment_names_endpoint
from phi3_tool.errors import Phi3Error

from ..errors import MissingExtraError, StageError, UsageError, first_line
from . import store

NODE = "integrate_with_promptflow"


def ask(
    flow_dir: Path,
    question: str,
    *,
    connection_name: str = "phi3_connection",
    connection: Any = None,
    chat_history: Sequence[Mapping[str, Any]] = (),
    **inputs: Any,
) -> str:
    """The flow's answer to `question`; `inputs` are further inputs of the flow (temperature, …).

    `connection`: Prompt flow's own object, instead of the stored one of a name. Raises StageError
    with the endpoint's own message when the model gave no answer.
    """
    if not (flow_dir / "flow.dag.yaml").is_file():
        raise UsageError(f"{flow_dir} is not a flow: expected a flow.dag.yaml in it")
    store.quiet()
    try:
        client = importlib.import_module("promptflow.client")
        entities = importlib.import_module("promptflow.entities")
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "promptflow", "flow") from None
    flow = client.load_flow(flow_dir)
    if connection is None and environment_names_endpoint():
        try:
            settings = ConnectionSettings.from_environment()
        except Phi3Error as error:
            raise StageError(str(error)) from None
        # The flow reads the environment itself; Prompt flow only requires some connection.
        connections = importlib.import_module("promptflow.connections")
        connection = connections.CustomConnection(
            name=connection_name,
            configs={"endpoint": settings.endpoint},
            secrets={"key": settings.key},
        )
    connection = connection or store.stored_connection(connection_name)
    # The one public way that opens neither the store's database nor the keyring.
    flow.context = entities.FlowContext(connections={NODE: {"connection": connection}})
    refused = importlib.import_module("promptflow.exceptions").PromptflowException
    try:
        answer = flow(input_data=question, chat_history=list(chat_history), **inputs)["answer"]
        return str(answer)
    except refused as error:
        inner = phi3_error_in(error)
        if inner is not None:
            raise StageError(str(inner)) from None
        raise StageError(
            f"Prompt flow could not run the flow: {first_line(error)}. "
            "For details: pf flow test --flow FOLDER"
        ) from None


def phi3_error_in(error: BaseException) -> Phi3Error | None:
    """The error of phi3_tool that Prompt flow wrapped in its own, if there is one."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, Phi3Error):
        # Prompt flow keeps the node's own exception there, not as `__cause__`.
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    return inner
