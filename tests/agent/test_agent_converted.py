"""A converted flow: its nodes run as they were, in order, with inputs in the flow's types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("agent_framework", reason="Agent Framework is in .venv-agent: make agent")

from tests.agent.recorded import KEY, Endpoint, run

from phi3_agent.converted import load, maker
from phi3_agent.rows import outcome
from phi3_tool.errors import ConfigurationError, RequestRejectedError
from phi3_training.agent.recorder import Reply

Start = Callable[..., Endpoint]

PREPARE = """\
from promptflow.core import tool

@tool
def prepare(text: str, count: int) -> dict:
    return {"parts": [text] * count, "count": count}
"""
ASK = """\
from promptflow import tool
from promptflow.connections import CustomConnection
from phi3_tool.chat import phi3_chat

@tool(streaming_option_parameter="stream")
async def wrong_name_is_not_taken(): ...

@tool(streaming_option_parameter="stream")
def ask(link: CustomConnection, prompt: str, history: list, stream: bool = False):
    assert link.key == link.secrets["key"]
    return phi3_chat(
        connection=link, input_data=prompt, chat_history=history, stream=stream
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def node(name: str, kind: str, path: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "type": kind, "path": path, "connections": [], **more}

    written = {
        "name": "mine",
        "inputs": {
            "q": {"type": "string", "chat_input": True},
            "history": {"type": "list", "default": []},
            "count": {"type": "int", "default": "2"},
        },
        "nodes": [
            node("prepare", "python", "prepare.py", function="prepare",
                 inputs={"text": "${inputs.q}", "count": "${inputs.count}"}),
            node("words", "prompt", "words.jinja2",
                 inputs={"first": "${prepare.output.parts[0]}", "n": "${prepare.output.count}"}),
            node("ask", "python", "ask.py", function="ask", connections=["link"],
                 inputs={"prompt": "${words.output}", "history": "${inputs.history}"}),
        ],
        "answer": "${ask.output}",
    }  # fmt: skip
    (tmp_path / "flow.json").write_text(json.dumps(written), encoding="utf-8")
    (tmp_path / "prepare.py").write_text(PREPARE, encoding="utf-8")
    (tmp_path / "words.jinja2").write_text("{{ n }} x {{ first }}\n", encoding="utf-8")
    (tmp_path / "ask.py").write_text(ASK, encoding="utf-8")
    return tmp_path


def row(stub: Endpoint, inputs: dict[str, Any], *, stream: bool = False) -> dict[str, Any]:
    url = stub.url("a", "openai" if stream else "score")
    return {
        "id": 1,
        "inputs": inputs,
        "stream": stream,
        "connection": {"endpoint": url, "key": KEY},
    }


def test_nodes_run_in_order_with_typed_inputs(endpoint: Start, folder: Path) -> None:
    stub = endpoint(a=[Reply(text=" It does. "), Reply(pieces=["It ", "does."])])
    make = maker(folder)
    turn = {"inputs": {"q": "one"}, "outputs": {"a": "two"}}
    asked = {"q": "{{ x }}", "count": "3", "history": [turn]}
    assert run(outcome(row(stub, asked), make))["answer"] == " It does. "
    assert run(outcome(row(stub, asked, stream=True), make))["answer"] == "It does."
    whole, streamed = (json.loads(body) for body in stub.bodies("a"))
    contents = [m["content"] for m in whole["input_data"]["input_string"]]
    assert contents == ["one", "two", "3 x {{ x }}\n"]
    assert [m["content"] for m in streamed["messages"]] == contents
    assert streamed["stream"] is True


def test_errors_leave_a_converted_flow_as_they_are(endpoint: Start, folder: Path) -> None:
    stub = endpoint(a=[Reply(401)])
    make = maker(folder)
    assert run(outcome(row(stub, {"q": "x"}), make))["error"]["kind"] == "AuthenticationError"
    missing = run(outcome(row(stub, {}), make))["error"]
    assert missing["kind"] == "RequestRejectedError"
    assert "q is missing" in missing["message"]
    with pytest.raises(ValueError, match="invalid literal"):
        run(outcome(row(stub, {"q": "x", "count": "many"}), make))


def test_inputs_are_typed_as_the_flow_declares(folder: Path) -> None:
    flow = load(folder)
    assert flow.given({"q": 1, "history": "[]"}) == {"q": "1", "history": [], "count": 2}
    with pytest.raises(RequestRejectedError, match="Not a list"):
        flow.given({"q": "x", "history": "none"})


def test_a_folder_without_a_flow_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="to-agent"):
        load(tmp_path)
