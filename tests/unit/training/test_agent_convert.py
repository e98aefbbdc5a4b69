"""`phi3 flow to-agent`: which flows can be converted, and what is said of the others."""

from __future__ import annotations

import json
import py_compile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_training.agent.convert import convert, describe, rows_of
from phi3_training.agent.environment import agent_python, command, environment
from phi3_training.agent.golden import GoldenRow
from phi3_training.agent.pack import pack_agent
from phi3_training.agent.parity import Compared
from phi3_training.errors import StageError, UsageError
from phi3_training.flow.source import FlowSource

ROOT = Path(__file__).parents[3]
TOOL = """\
from promptflow.core import tool
from promptflow.connections import CustomConnection

@tool
def ask(conn: CustomConnection, text: str, style: str = "plain") -> str:
    return text
"""


def flow_in(folder: Path, nodes: list[dict[str, Any]], **more: Any) -> FlowSource:
    dag = {
        "inputs": {"q": {"type": "string", "is_chat_input": True}},
        "outputs": {"a": {"type": "string", "reference": "${ask.output}"}},
        "nodes": nodes,
        **more,
    }
    (folder / "flow.dag.yaml").write_text(yaml.safe_dump(dag), encoding="utf-8")
    (folder / "ask.py").write_text(TOOL, encoding="utf-8")
    (folder / "p.jinja2").write_text("About {{ q }}: be brief.", encoding="utf-8")
    (folder / "broken.py").write_text("def x(:\n", encoding="utf-8")
    return FlowSource.read(folder)


def python(name: str = "ask", **inputs: Any) -> dict[str, Any]:
    source = {"type": "code", "path": "ask.py"}
    return {"name": name, "type": "python", "source": source, "inputs": inputs}


def prompt(name: str = "p", **inputs: Any) -> dict[str, Any]:
    source = {"type": "code", "path": "p.jinja2"}
    return {"name": name, "type": "prompt", "source": source, "inputs": inputs}


def test_connections_are_found_by_annotation_and_nodes_are_ordered(tmp_path: Path) -> None:
    nodes = [python(conn="my_connection", text="${p.output}", style="x"), prompt(q="${inputs.q}")]
    written = describe(flow_in(tmp_path, nodes))
    assert [node["name"] for node in written["nodes"]] == ["p", "ask"]
    ask = written["nodes"][1]
    assert ask["connections"] == ["conn"]
    assert ask["inputs"] == {"text": "${p.output}", "style": "x"}
    assert ask["function"] == "ask"
    assert written["answer"] == "${ask.output}"
    assert written["inputs"] == {"q": {"type": "string", "chat_input": True}}


@pytest.mark.parametrize("name", ["phi3_chat", "phi3_rag_chat"])
def test_the_shipped_flows_can_be_converted(name: str) -> None:
    written = describe(FlowSource.read(ROOT / "flows" / name))
    assert written["nodes"][-1]["connections"] == ["connection"]
    assert "default" not in written["inputs"]["input_data"]


def test_everything_that_cannot_be_converted_is_named_with_its_node(tmp_path: Path) -> None:
    nodes = [
        {"name": "gpt", "type": "llm", "source": {"type": "code", "path": "p.jinja2"}},
        {"name": "packed", "type": "python", "source": {"type": "package", "tool": "x.y"}},
        {**python("sometimes", conn="a", text="${inputs.q}"), "activate": {"when": "x", "is": 1}},
        {**python("sum", conn="b", text="${gone.output}"), "aggregation": True},
        {**python("lost"), "source": {"type": "code", "path": "none.py"}},
        {**python("broken", text="${inputs.q}"), "source": {"type": "code", "path": "broken.py"}},
        python("old", text="${flow.q}"),
    ]
    with pytest.raises(UsageError) as caught:
        describe(flow_in(tmp_path, nodes, node_variants={"v": {"variants": {}}}))
    said = str(caught.value)
    for part in (
        "node gpt: type llm",
        "node packed: its tool x.y",
        "node sometimes: activate",
        "node sum: aggregation",
        "node lost: none.py is not in",
        "node broken: broken.py is not Python",
        "node old: its input text",
        "node v: variants",
        "several connections (a, b)",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([python(text="${p.output}"), prompt(q="${ask.output}")], "each waits for another"),
        ([python(text="${none.output}")], "no node none"),
    ],
)
def test_nodes_that_cannot_run(tmp_path: Path, nodes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        describe(flow_in(tmp_path, nodes))


def test_rows_without_an_input_convert_nothing(tmp_path: Path) -> None:
    flow_in(tmp_path, [python(conn="c", text="${inputs.q}")])
    data = tmp_path / "rows.jsonl"
    data.write_text('{"q": "x"}\n{"other": 1}\nnot json\n', encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        convert(tmp_path, data, tmp_path / "out")
    assert f"{data}:2: no q; it has other" in str(caught.value)
    assert f"{data}:3: not a JSON object" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rows_keep_the_flows_inputs_alone(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"q": "x", "n": None, "other": 1}) + "\n", encoding="utf-8")
    whole, streamed = rows_of(data, {"q": {}, "n": {"default": 3}})
    assert whole.inputs == {"q": "x"}
    assert streamed.stream


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([Compared("line 1", 1), Compared("line 2", 1, "answer at 3")], "line 2: answer at 3"),
        ([Compared("line 1", 0, error="KeyError")], "answers no row"),
    ],
)
def test_what_is_not_proved_leaves_nothing(
    tmp_path: Path, found: list[Compared], said: str
) -> None:
    def prove(
        rows: Sequence[GoldenRow], *, flow: Path | None = None, folder: str = ""
    ) -> Iterator[Compared]:
        assert len(rows) == 2
        assert flow == tmp_path
        assert (Path(folder) / "agent.py").is_file()
        return iter(found)

    flow_in(tmp_path, [python(conn="c", text="${inputs.q}")])
    data = tmp_path / "rows.jsonl"
    data.write_text('{"q": "x"}\n', encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StageError, match=said):
        convert(tmp_path, data, tmp_path / "out", prove)
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    flow_in(tmp_path, [python(conn="c", text="${inputs.q}")])
    with pytest.raises(UsageError, match="exists"):
        convert(tmp_path, tmp_path / "rows.jsonl", tmp_path)


def test_without_the_environment_the_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import phi3_training.agent.environment as module

    monkeypatch.setattr(module, "CLONE", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StageError, match="pip install"):
        agent_python({})
    (tmp_path / "Makefile").touch()
    with pytest.raises(StageError, match="make agent"):
        agent_python({})
    with pytest.raises(UsageError, match="does not exist"):
        agent_python({"PHI3_AGENT_PYTHON": str(tmp_path / "none")})


def test_the_key_goes_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3_KEY", "another-endpoints-key")
    monkeypatch.setenv("PHI3_DEPLOYMENT", "blue")
    variables = environment({"PHI3_ENDPOINT": "http://localhost/score", "PHI3_KEY": "secret"})
    assert variables["PHI3_KEY"] == "secret"
    assert "PHI3_DEPLOYMENT" not in variables
    assert "secret" not in " ".join(command(Path("python"), ["chat", "--", "Hi"]))


def test_a_packed_agent_is_whole_and_holds_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3_KEY", "the-secret-key")
    monkeypatch.setenv("PHI3_ENDPOINT", "http://127.0.0.1:1/score")
    # As pip leaves an installed package.
    py_compile.compile(str(ROOT / "training/phi3_training/agent/hosted_files/main.py"))
    packed = pack_agent(tmp_path, "support")
    again = pack_agent(tmp_path, "support")
    assert packed == again
    manifest = yaml.safe_load((packed.folder / "agent.yaml").read_text(encoding="utf-8"))
    assert manifest["kind"] == "hosted"
    assert manifest["name"] == "support"
    assert {"Dockerfile", "main.py", "requirements.txt", ".dockerignore"} <= set(packed.files)
    assert {"phi3_agent/client.py", "phi3_tool/client.py"} <= set(packed.files)
    for name in packed.files:
        text = (packed.folder / name).read_text(encoding="utf-8")
        assert "the-secret-key" not in text
        assert "@NAME@" not in text
    (tmp_path / "other").mkdir()
    for name in ("other", "-x", "a_b", ""):
        with pytest.raises(UsageError):
            pack_agent(tmp_path, name)
