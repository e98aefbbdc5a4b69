"""The package tool "Phi-3 chat": as Prompt flow lists it, resolves it and runs it."""

from __future__ import annotations

import inspect
import json
import logging
import traceback
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tests.integration.stub_endpoint import KEY, Reply, StubEndpoint

from phi3_tool import AuthenticationError, ConfigurationError, Phi3Error
from phi3_tool.registry import list_package_tools

pytest.importorskip("promptflow.core", reason="the extra `flow` is not installed")

TOOL = "phi3_tool.chat.phi3_chat"
FLOW = """
inputs: {question: {type: string, default: Hi}}
outputs: {answer: {type: string, reference: "${ask.output}"}}
nodes:
- name: ask
  type: python
  source: {type: package, tool: phi3_tool.chat.phi3_chat}
  inputs: {connection: phi3_connection, input_data: "${inputs.question}", temperature: 0.5}
"""


def connection(stub: StubEndpoint, **configs: str) -> object:
    from promptflow.connections import CustomConnection

    return CustomConnection(configs={"endpoint": stub.url(), **configs}, secrets={"key": KEY})


def sent(stub: StubEndpoint) -> dict[str, object]:
    asked = json.loads(stub.seen[-1].body)["input_data"]
    assert isinstance(asked, dict)
    return asked


def installed() -> bool:
    return "phi3_tool" in {point.name for point in entry_points(group="package_tools")}


needs_install = pytest.mark.skipif(
    not installed(), reason="phi3-promptflow is not installed here: pip install -e ."
)


@needs_install
def test_prompt_flow_collects_it() -> None:
    from promptflow._core.tools_manager import collect_package_tools

    found = collect_package_tools()[TOOL]
    assert (found["name"], found["package"]) == ("Phi-3 chat", "phi3-promptflow")


def test_the_yaml_says_what_the_function_takes() -> None:
    """Names, order, types and defaults; and a help text for each. `stream` is Prompt flow's."""
    from promptflow._utils.tool_utils import function_to_interface

    from phi3_tool.chat import phi3_chat

    listed = list_package_tools()[TOOL]["inputs"]
    function = inspect.unwrap(phi3_chat)
    taken, _, _, _ = function_to_interface(function, gen_custom_type_conn=True)
    assert list(listed) == [name for name in taken if name != "stream"]
    assert listed["connection"]["custom_type"] == taken["connection"].custom_type
    parameters = inspect.signature(function).parameters
    for name, parameter in ((name, parameters[name]) for name in listed):
        assert listed[name]["type"] == [getattr(t, "value", t) for t in taken[name].type], name
        assert listed[name]["description"]
        if parameter.default is not inspect.Parameter.empty:
            assert listed[name]["default"] == ([] if name == "chat_history" else parameter.default)


@needs_install
def test_a_package_node_runs(tmp_path: Path) -> None:
    from promptflow.executor import FlowExecutor

    (tmp_path / "flow.dag.yaml").write_text(FLOW)
    with StubEndpoint() as stub:
        value = {"endpoint": stub.url(), "key": KEY}
        stored = {
            "phi3_connection": {
                "type": "CustomConnection",
                "module": "promptflow.connections",
                "value": value,
                "secret_keys": ["key"],
            }
        }
        executor = FlowExecutor.create(tmp_path / "flow.dag.yaml", stored)
        assert executor.exec_line({"question": "Hi"}).output == {"answer": "ok"}
        assert sent(stub)["input_string"] == [{"role": "user", "content": "Hi"}]
        parameters = {
            "temperature": 0.5,
            "top_p": 1.0,
            "max_new_tokens": 256,
            "max_tokens": 256,
        }
        assert sent(stub)["parameters"] == parameters


def test_no_noise_and_one_connection(caplog: pytest.LogCaptureFixture) -> None:
    from phi3_tool.chat import phi3_chat

    caplog.set_level(logging.INFO)
    with StubEndpoint() as stub:
        for _ in range(5):
            assert phi3_chat(connection(stub), "Hi") == "ok"
        assert stub.connections == 1
    assert caplog.records == []


def test_another_key_gets_another_client() -> None:
    from promptflow.connections import CustomConnection

    from phi3_tool.chat import phi3_chat

    with StubEndpoint() as stub:
        for key in ("one", "two", "one"):
            stored = CustomConnection(configs={"endpoint": stub.url()}, secrets={"key": key})
            phi3_chat(stored, "Hi")
        keys = [seen.headers["authorization"] for seen in stub.seen]
        assert keys == ["Bearer one", "Bearer two", "Bearer one"]
        assert stub.connections == 2


def test_the_environment_outranks_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3_tool.chat import phi3_chat

    with StubEndpoint() as stored, StubEndpoint() as named:
        monkeypatch.setenv("PHI3_ENDPOINT", named.url())
        with pytest.raises(ConfigurationError) as caught:
            phi3_chat(connection(stored), "Hi")
        assert "PHI3_KEY is not set" in str(caught.value)
        monkeypatch.setenv("PHI3_KEY", "another")
        assert phi3_chat(connection(stored), "Hi") == "ok"
        assert phi3_chat(None, "Hi") == "ok"
        assert stored.seen == []
        assert {seen.headers["authorization"] for seen in named.seen} == {"Bearer another"}


@pytest.mark.parametrize(
    ("configs", "settings", "turns"),
    [
        ({}, {}, 38),
        ({}, {"max_new_tokens": 3000}, 10),
        ({}, {"max_new_tokens": 4096}, 0),
        ({"context_length": "512"}, {}, 2),
        ({"context_length": "512"}, {"max_history_tokens": 10_000}, 2),
        ({}, {"max_history_tokens": 210}, 2),
        ({}, {"max_history_tokens": 8000}, 60),
    ],
)
def test_the_history_fits_the_context(
    configs: dict[str, str], settings: dict[str, int], turns: int
) -> None:
    """Each earlier turn counts as 100 tokens, the question as 6; the newest turns are kept."""
    from phi3_tool.chat import phi3_chat

    history = [
        {"inputs": {"input_data": f"{i:>135}"}, "outputs": {"answer": f"{i:>135}"}}
        for i in range(60)
    ]
    with StubEndpoint() as stub:
        phi3_chat(connection(stub, **configs), "Hi", history, **settings)
        messages = sent(stub)["input_string"]
    assert isinstance(messages, list)
    kept = [int(message["content"]) for message in messages[:-1:2]]
    assert kept == list(range(60))[60 - turns :]


def test_an_error_is_one_line_without_a_trail() -> None:
    from phi3_tool.chat import phi3_chat

    with StubEndpoint(Reply(401, b"no")) as stub, pytest.raises(Phi3Error) as caught:
        phi3_chat(connection(stub), "Hi")
    error = caught.value
    assert type(error) is AuthenticationError
    assert error.__context__ is None
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert "client.py" not in shown
    assert KEY not in shown
