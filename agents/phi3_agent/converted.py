"""Runs a flow that `phi3 flow to-agent` converted: one executor per node, the nodes as they were.

Reads FOLDER/flow.json (written by the conversion) and imports the node files next to it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_framework import (
    Executor,
    Workflow,
    WorkflowBuilder,
    WorkflowContext,
    WorkflowRunResult,
    handler,
)

from phi3_tool.connection import settings_of
from phi3_tool.errors import ConfigurationError, Phi3Error, RequestRejectedError

from .client import in_framework, phi3_error
from .promptflow_names import CustomConnection, provide_names

FLOW = "flow.json"
_PART = re.compile(r"(\w+)|\['(.*?)'\]|\[(\d+)\]")


@dataclass(frozen=True)
class Node:
    """One node: what it is called with, and how."""

    name: str
    inputs: Mapping[str, Any]
    connections: tuple[str, ...]
    call: Callable[..., Any]
    streaming: str = ""  # the parameter that asks for a stream


@dataclass(frozen=True)
class Flow:
    """A converted flow: inputs with types and defaults, nodes in order, what the answer is."""

    name: str
    inputs: Mapping[str, Mapping[str, Any]]
    nodes: tuple[Node, ...]
    answer: str

    def given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The flow's inputs in their types; raises RequestRejectedError for one that is missing."""
        # A null counts as not given, as in Prompt flow.
        known = {name: value for name, value in values.items() if value is not None}
        missing = [
            n for n, about in self.inputs.items() if n not in known and "default" not in about
        ]
        if missing:
            raise RequestRejectedError(f"The flow's input {', '.join(missing)} is missing")
        return {
            name: _typed(known.get(name, about.get("default")), str(about.get("type", "")))
            for name, about in self.inputs.items()
        }


@dataclass(frozen=True)
class State:
    """What travels from node to node: the inputs, the outputs so far, the connection."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    connection: CustomConnection


def load(folder: Path) -> Flow:
    """The flow in a folder; raises ConfigurationError where it cannot be read."""
    try:
        written = json.loads((folder / FLOW).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{folder} holds no converted flow ({error}); make one with: phi3 flow to-agent FLOW"
        ) from None
    # Before the first node is imported: nodes begin with `from promptflow.core import tool`.
    provide_names()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # the nodes import each other
    nodes = []
    for node in written["nodes"]:
        path = folder / node["path"]
        if node["type"] == "prompt":
            call: Callable[..., Any] = _template(path)
        else:
            # By its path: two nodes' files may have one name in different folders.
            spec = importlib.util.spec_from_file_location(path.stem, path)
            if spec is None or spec.loader is None:
                raise ConfigurationError(f"{path} cannot be imported")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            call = getattr(module, node["function"])
        streaming = getattr(call, "__phi3_tool__", "")
        connections = tuple(node["connections"])
        nodes.append(Node(node["name"], node["inputs"], connections, call, streaming))
    return Flow(written["name"], written["inputs"], tuple(nodes), written["answer"])


class NodeExecutor(Executor):
    """One node of the flow."""

    def __init__(self, flow: Flow, node: Node) -> None:
        super().__init__(id=node.name)
        self._flow = flow
        self._node = node
        self._last = node is flow.nodes[-1]

    @handler
    async def run(self, state: State, ctx: WorkflowContext[State, Any]) -> None:
        """Call the node; the last one yields the flow's answer."""
        node = self._node
        given = {name: value_of(value, state) for name, value in node.inputs.items()}
        given.update(dict.fromkeys(node.connections, state.connection))
        # Only an answer that goes straight to a person may come in pieces.
        direct = self._flow.answer in (f"${{{node.name}}}", f"${{{node.name}.output}}")
        streams = bool(node.streaming and ctx.is_streaming() and direct)
        if streams:
            given[node.streaming] = True
        try:
            # A plain function blocks, as Prompt flow's own pool of threads expects it to.
            if inspect.iscoroutinefunction(node.call):
                output = await node.call(**given)
            else:
                output = await asyncio.to_thread(node.call, **given)
            if streams and isinstance(output, Iterator):
                # Each `next` waits for the endpoint, so it has a thread; the loop stays free.
                pieces, output = output, ""
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    output += piece
                    await ctx.yield_output(piece)
                direct = False
        except Phi3Error as error:
            raise in_framework(error) from error
        new = State(state.inputs, {**state.outputs, node.name: output}, state.connection)
        if not self._last:
            await ctx.send_message(new)
        elif not streams or direct:
            await ctx.yield_output(value_of(self._flow.answer, new))


def create_workflow(flow: Flow) -> Workflow:
    """A workflow for one request."""
    executors = [NodeExecutor(flow, node) for node in flow.nodes]
    builder = WorkflowBuilder(
        name=flow.name, start_executor=executors[0], output_from=[executors[-1]]
    )
    if len(executors) > 1:
        builder = builder.add_chain(executors)
    return builder.build()


def connection_for(row_connection: object) -> CustomConnection:
    """The connection that the nodes get: the row's, or that of PHI3_ENDPOINT and PHI3_KEY."""
    settings = settings_of(row_connection)
    configs = {"endpoint": settings.endpoint}
    for name in ("deployment", "dialect", "context_length", "auth"):
        value = getattr(settings, name)
        if value is not None:
            configs[name] = str(value)
    return CustomConnection({"key": settings.key} if settings.key else {}, configs, "phi3")


def maker(folder: Path) -> Callable[[Mapping[str, Any]], tuple[Workflow, State]]:
    """Workflow and inputs of a row, for `rows`."""
    flow = load(folder)

    def make(row: Mapping[str, Any]) -> tuple[Workflow, State]:
        state = State(flow.given(row["inputs"]), {}, connection_for(row.get("connection")))
        return create_workflow(flow), state

    return make


def value_of(value: Any, state: State) -> Any:
    """A node's input: a literal, an input of the flow, or (part of) another node's output."""
    if not (isinstance(value, str) and value.startswith("${") and value.endswith("}")):
        return value
    first, _, rest = value[2:-1].partition(".")
    if first == "inputs":
        return state.inputs[rest]
    _, _, parts = rest.partition(".")  # after `output`
    output = state.outputs[first]
    for word, key, index in _PART.findall(parts):
        if word:
            # As Prompt flow reads ${node.output.a.b}: keys of a dict, attributes of anything else.
            output = output[word] if isinstance(output, dict) else getattr(output, word)
        else:
            output = output[int(index)] if index else output[key]
    return output


def _typed(value: Any, kind: str) -> Any:
    """A value in the type that the flow declares, as Prompt flow makes it."""
    if kind == "int":
        return int(value)
    if kind == "double":
        return float(value)
    if kind == "bool" and isinstance(value, str):
        return value.lower() == "true"
    if kind == "string":
        return str(value)
    if kind in ("list", "object") and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            if kind == "list":
                raise RequestRejectedError(f"Not a list: {value!r:.80}") from None
    return value


def _template(path: Path) -> Callable[..., str]:
    try:
        from jinja2.sandbox import SandboxedEnvironment
    except ModuleNotFoundError:
        raise ConfigurationError(
            f"{path.name} is a prompt: install what renders it with: "
            f"{sys.executable} -m pip install jinja2"
        ) from None
    # As Prompt flow's own prompt tool has it.
    environment = SandboxedEnvironment(trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(path.read_text(encoding="utf-8"))

    def render(**given: Any) -> str:
        return template.render(**given)

    return render


def main(folder: Path, words: list[str]) -> int:
    """`agent.py`: one question; further inputs as name=value. Prints the answer."""
    flow = load(folder)
    first = next((n for n, about in flow.inputs.items() if about.get("chat_input")), "")
    question = [word for word in words if "=" not in word]
    given: dict[str, Any] = dict(word.split("=", 1) for word in words if "=" in word)
    if question and first:
        # Unquoted words of a question are one question.
        given[first] = " ".join(question)
    try:
        state = State(flow.given(given), {}, connection_for(None))

        async def run() -> WorkflowRunResult:  # `Workflow.run` must be called inside a loop
            return await create_workflow(flow).run(state)

        result = asyncio.run(run())
    except Exception as error:
        failure = phi3_error(error)
        if failure is None:
            raise
        sys.stderr.write(f"Error: {failure}\n")
        return 1
    sys.stdout.write(f"{result.get_outputs()[0]}\n")
    return 0
