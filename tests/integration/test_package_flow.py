"""flows/phi3_chat_package: the package tool and nothing but YAML, over a Phi3Connection."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from tests.integration.pf_home import ROOT, Endpoint, PfHome, endpoint, pf_home

import phi3_tool

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

KEY = "package-test-key-3e"
FLOW = ROOT / "flows/phi3_chat_package"
TYPED = ROOT / "connections/phi3_typed_connection.yaml"

if "phi3_tool" not in {point.name for point in entry_points(group="package_tools")}:
    pytest.skip("phi3-promptflow is not installed here: pip install -e .", allow_module_level=True)


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    with endpoint(KEY) as state:
        yield state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, served: Endpoint) -> Iterator[PfHome]:
    """The connection is written as its template says."""
    with pf_home(tmp_path_factory.mktemp("package") / "home") as state:
        state.connect("http://127.0.0.1:1/score", "readies-the-keyring", name="other")
        values = [f"configs.endpoint={served.url}", f"secrets.key={KEY}"]
        done = state.pf("connection", "create", "--file", TYPED, "--set", *values)
        assert done.code == 0, done.text
        assert "Phi3Connection" in done.out
        assert KEY not in done.text
        yield state


@pytest.fixture(scope="module")
def flow(home: PfHome) -> Path:
    return shutil.copytree(FLOW, home.path / "flow", ignore=shutil.ignore_patterns(".promptflow"))


def test_the_flow_is_yaml_and_a_few_words() -> None:
    names = {path.name for path in FLOW.iterdir() if path.name != ".promptflow"}
    assert names == {"flow.dag.yaml", "README.md"}


def test_it_is_valid_and_so_is_the_tool(home: PfHome, flow: Path) -> None:
    for command in (
        ("flow", "validate", "--source", flow),
        ("tool", "validate", "--source", "phi3_tool.chat.phi3_chat"),
    ):
        done = home.pf(*command)
        assert done.code == 0, done.text
        assert json.loads(done.out)["result"] == "Succeeded"


def test_it_answers_and_continues_a_conversation(
    home: PfHome, flow: Path, served: Endpoint
) -> None:
    question = "input_data=Who founded Contoso?"
    done = home.pf("flow", "test", "--flow", flow, "--inputs", question)
    assert done.code == 0, done.text
    assert json.loads(done.out[done.out.index("\n{") :]) == {"answer": "1: Who founded Contoso?"}
    done = home.pf("flow", "test", "--flow", flow, "--interactive", feed="What?\nAnd when?\n")
    assert done.code == 0, done.text
    assert "Bot: 1: What?" in done.out
    assert "Bot: 3: And when?" in done.out
    contents = [message["content"] for message in served.conversations[-1]]
    assert contents == ["What?", "1: What?", "And when?"]


def test_the_code_flow_takes_the_typed_connection_too(home: PfHome) -> None:
    done = home.pf("flow", "test", "--flow", home.copy_flow(), "--inputs", "input_data=Hi")
    assert done.code == 0, done.text
    assert json.loads(done.out[done.out.index("\n{") :]) == {"answer": "1: Hi"}


@pytest.mark.parametrize("typed", [True, False])
def test_either_connection_reaches_the_tool_as_a_phi3_connection(
    typed: bool, served: Endpoint, tmp_path: Path
) -> None:
    from promptflow.executor import FlowExecutor

    shutil.copy(FLOW / "flow.dag.yaml", tmp_path)
    about = {"custom_type": "Phi3Connection", "module": "phi3_tool.connection_type"}
    marks = {f"promptflow.connection.{name}": value for name, value in about.items()}
    stored = {
        "type": "CustomConnection",
        "module": "promptflow.connections",
        "value": {"endpoint": served.url, "key": KEY, **(marks if typed else {})},
        "secret_keys": ["key"],
    }
    executor = FlowExecutor.create(tmp_path / "flow.dag.yaml", {"phi3_connection": stored})
    (node,) = executor._flow.nodes
    given = node.inputs["connection"].value
    assert type(given).__name__ == "Phi3Connection"
    assert (given.endpoint, given.key) == (served.url, KEY)
    assert KEY not in repr(given)
    assert executor.exec_line({"input_data": "Hi"}).output == {"answer": "1: Hi"}


def test_prompt_flow_knows_the_connection_type(caplog: pytest.LogCaptureFixture) -> None:
    from promptflow._core.tools_manager import collect_package_tools_and_connections

    tools, types, _templates = collect_package_tools_and_connections(["phi3_tool.chat.phi3_chat"])
    assert list(tools) == ["phi3_tool.chat.phi3_chat"]
    fields = types["phi3_tool.connection_type.Phi3Connection"]["configSpecs"]
    assert {field["name"]: (field["configValueType"], field["isOptional"]) for field in fields} == {
        "key": ("Secret", False),
        "endpoint": ("str", False),
        "deployment": ("str", True),
        "api": ("str", True),
    }
    assert not [record for record in caplog.records if "phi3" in record.getMessage()]


def test_the_template_fits_the_type_and_holds_placeholders_only() -> None:
    template: dict[str, Any] = yaml.safe_load(TYPED.read_text(encoding="utf-8"))
    node = yaml.safe_load((FLOW / "flow.dag.yaml").read_text(encoding="utf-8"))["nodes"][0]
    assert template["name"] == node["inputs"]["connection"]
    assert template["package_version"] == phi3_tool.__version__
    for value in [*template["configs"].values(), *template["secrets"].values()]:
        assert re.fullmatch(r"<.+>", value)
