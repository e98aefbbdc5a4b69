"""The flow and connection files as they lie in the repository: consistent, and free of secrets."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "flows/phi3_chat"
NODE = FLOW / "integrate_with_promptflow.py"


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def node_function() -> ast.FunctionDef:
    tree = ast.parse(NODE.read_text(encoding="utf-8"))
    (function,) = [item for item in tree.body if isinstance(item, ast.FunctionDef)]
    return function


def defaults(function: ast.FunctionDef) -> dict[str, Any]:
    names = [argument.arg for argument in function.args.args][-len(function.args.defaults) :]
    return {
        name: ast.literal_eval(value)
        for name, value in zip(names, function.args.defaults, strict=True)
    }


def test_one_chat_input_and_its_history() -> None:
    inputs = load(FLOW / "flow.dag.yaml")["inputs"]
    assert [name for name, about in inputs.items() if about.get("is_chat_input")] == ["input_data"]
    history = [name for name, about in inputs.items() if about.get("is_chat_history")]
    assert history == ["chat_history"]
    # A default would answer a request that lacks the question with the answer to another one.
    without = [name for name, about in inputs.items() if "default" not in about]
    assert without == ["input_data"]


def test_tool_takes_what_the_flow_gives() -> None:
    """Same names in the node, the function and the flow; the same defaults in both."""
    flow = load(FLOW / "flow.dag.yaml")
    (node,) = flow["nodes"]
    function = node_function()
    # Prompt flow sets `stream` itself.
    *taken, stream = [argument.arg for argument in function.args.args]
    assert (list(node["inputs"]), stream) == (taken, "stream")
    assert node["name"] == function.name == NODE.stem
    assert node["source"]["path"] == NODE.name
    expected = {name: value for name, value in defaults(function).items() if name != "stream"}
    assert {name: flow["inputs"][name]["default"] for name in expected} == expected
    references = {f"${{inputs.{name}}}" for name in flow["inputs"]}
    assert set(node["inputs"].values()) == references | {"phi3_connection"}


def test_annotations_can_be_read_at_run_time() -> None:
    """Prompt flow reads the real types: postponed evaluation would hide the connection's."""
    assert "from __future__" not in NODE.read_text(encoding="utf-8")
    assert all(argument.annotation is not None for argument in node_function().args.args)


def test_included_source_is_where_the_flow_says() -> None:
    (include,) = load(FLOW / "flow.dag.yaml")["additional_includes"]
    assert (FLOW / include).resolve() == ROOT / "tools/phi3_tool"
    assert (FLOW / include / "chat.py").is_file()


def test_samples_fit_the_flow_and_the_batch_run() -> None:
    flow, run = load(FLOW / "flow.dag.yaml"), load(FLOW / "run.yaml")
    lines = (FLOW / run["data"]).read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert any(sample["chat_history"] for sample in samples)
    for sample in samples:
        assert run["column_mapping"] == {name: f"${{data.{name}}}" for name in sample}
        assert set(sample) <= set(flow["inputs"])
        for turn in sample["chat_history"]:
            assert set(turn["inputs"]) == {"input_data"}
            assert set(turn["outputs"]) == set(flow["outputs"])


@pytest.mark.parametrize("name", ["phi3_connection.yaml", "phi3_azure_connection.yaml"])
def test_connection_templates_hold_placeholders_only(name: str) -> None:
    template = load(ROOT / "connections" / name)
    (node,) = load(FLOW / "flow.dag.yaml")["nodes"]
    assert template["type"] == "custom"
    assert template["name"] == node["inputs"]["connection"]
    for value in [*template["configs"].values(), *template["secrets"].values()]:
        assert re.fullmatch(r"<.+>", value)
