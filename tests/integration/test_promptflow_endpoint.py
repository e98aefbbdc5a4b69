"""The chat flow against the real local endpoint and a model that was taught its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.pf_home import PfHome, pf_home
from tests.integration.server_fixture import KEY, PAIRS, Served, served

pytest_plugins = ("tests.integration.server_plugin",)
pytest.importorskip("promptflow", reason="the extra `flow` is not installed")


@pytest.fixture(scope="module")
def endpoint(engine: object) -> Iterator[Served]:
    with served(engine) as state:
        yield state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, endpoint: Served) -> Iterator[PfHome]:
    with pf_home(tmp_path_factory.mktemp("road") / "home") as state:
        state.connect(f"{endpoint.url}/score", KEY)
        yield state


@pytest.fixture(scope="module")
def flow(home: PfHome) -> Path:
    return home.copy_flow()


def test_taught_answer_comes_through_the_flow(home: PfHome, flow: Path) -> None:
    question, answer = PAIRS[7]
    done = home.pf("flow", "test", "--flow", flow, "--inputs", f"input_data={question}")
    assert done.code == 0, done.text
    assert json.loads(done.out[done.out.index("\n{") :]) == {"answer": answer}


def test_taught_answer_streams_from_the_real_endpoint(endpoint: Served) -> None:
    """In OpenAI's dialect token by token, in Azure's as one piece; the same words."""
    from promptflow.connections import CustomConnection

    from phi3_tool.chat import list_deployments, phi3_chat

    question, answer = PAIRS[11]
    counts = {}
    for path in ("/score", "/v1/chat/completions"):
        configs = {"endpoint": f"{endpoint.url}{path}"}
        stored = CustomConnection(configs=configs, secrets={"key": KEY})
        pieces = list(phi3_chat(stored, question, max_new_tokens=64, stream=True))
        assert "".join(pieces) == answer
        counts[path] = len(pieces)
        assert [choice["value"] for choice in list_deployments(stored)] == ["", "phi3"]
    assert counts["/score"] == 1
    assert counts["/v1/chat/completions"] > 5


def test_batch_run_mixes_nothing_up(home: PfHome, flow: Path) -> None:
    """Several workers ask at once; every line gets the answer to its own question."""
    pairs = PAIRS[:16]
    data = home.path / "questions.jsonl"
    data.write_text("".join(json.dumps({"question": q}) + "\n" for q, _ in pairs), encoding="utf-8")
    mapping = "input_data=${data.question}"
    create = ["run", "create", "--flow", flow, "--data", data, "--name", "taught"]
    done = home.pf(*create, "--column-mapping", mapping)
    assert done.code == 0, done.text
    output = home.pf_dir / ".runs/taught/flow_outputs/output.jsonl"
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in rows] == [answer for _, answer in pairs]


def test_refused_key_is_refused_for_real(home: PfHome, flow: Path, endpoint: Served) -> None:
    env = {"PHI3_ENDPOINT": f"{endpoint.url}/score", "PHI3_KEY": "not-the-key-44"}
    done = home.pf("flow", "test", "--flow", flow, "--inputs", "input_data=Hi", env=env)
    assert done.code == 1
    assert "AuthenticationError" in done.out.strip().splitlines()[-1]
    assert "not-the-key-44" not in done.text
