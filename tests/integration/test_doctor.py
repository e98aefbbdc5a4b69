"""`phi3 doctor` on connections, endpoints and flows, sound ones and each kind of broken one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tests.integration.pf_home import ROOT, Done, PfHome, endpoint, pf_home
from tests.integration.stub_endpoint import Reply, Seen, StubEndpoint, no_listener

from phi3_tool import ConnectionSettings
from phi3_training.doctor import Finding, State
from phi3_training.doctor.endpoint import ask, connection_findings, token_finding
from phi3_training.doctor.endpoint import endpoint as endpoint_findings
from phi3_training.doctor.flow import Connection, flow, package_tool, tools_of
from phi3_training.flow import store
from phi3_training.flow.source import FlowSource, connection_of

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")

KEY = "doctor-key-3b/9f+e1"
SECONDS = 10.0
ANSWER = Reply(body=b'{"output": "Bill"}')
CHOICES = b'{"choices": [{"message": {"role": "assistant", "content": "Bill"}}]}'


def by_check(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {each.check: each for each in findings}


def settings(url: str, **options: str) -> ConnectionSettings:
    return ConnectionSettings.from_connection({"endpoint": url, "key": KEY, **options})


def told(stub: StubEndpoint, path: str = "/score", **options: str) -> dict[str, Finding]:
    """What one question tells of the connection and the endpoint."""
    asked = ask(settings(stub.url(path), **options), SECONDS)
    findings = by_check(connection_findings(asked))
    return {**findings, "one token": token_finding(asked)}


def states(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: each.state.value for name, each in findings.items()}


def test_an_endpoint_that_answers() -> None:
    reply = Reply(body=ANSWER.body, headers={"azureml-model-deployment": "blue"})
    with StubEndpoint(reply) as stub:
        found = told(stub)
    assert set(states(found).values()) == {"ok"}
    assert "guessed from the path" in found["dialect"].said
    assert "blue" in found["deployment"].said
    sent = json.loads(stub.seen[0].body)
    assert sent["input_data"]["parameters"]["max_new_tokens"] == 1
    assert len(stub.seen) == 1


def test_a_key_that_is_refused() -> None:
    with StubEndpoint(Reply(401, b'{"message": "no"}')) as stub:
        found = told(stub)
    assert found["key"].state is State.FAULT
    assert "phi3 connect" in found["key"].fix
    assert states(found)["dialect"] == states(found)["deployment"] == "skipped"
    assert found["one token"].state is State.FAULT


@pytest.mark.parametrize(
    ("given", "speaks", "body"),
    [
        ("/score", "/v1/chat/completions", CHOICES),
        ("/v1/chat/completions", "/score", ANSWER.body),
    ],
)
def test_the_other_dialect_is_spoken_there(given: str, speaks: str, body: bytes) -> None:
    def script(seen: Seen) -> Reply:
        return Reply(body=body) if seen.path == speaks else Reply(404, b"")

    with StubEndpoint(script=script) as stub:
        found = told(stub, given)
    assert found["dialect"].state is State.FAULT
    assert stub.url(speaks) in found["dialect"].fix
    assert found["key"].state is State.OK


def test_an_answer_that_no_chat_endpoint_gives() -> None:
    with StubEndpoint(Reply(body=b"<html>")) as stub:
        found = told(stub)
    assert found["dialect"].state is State.FAULT
    assert "scoring URI" in found["dialect"].fix


def test_no_deployment_with_traffic() -> None:
    with StubEndpoint(Reply(404, b"Specified traffic group could not be found")) as stub:
        found = told(stub)
        named = told(stub, deployment="green")
    assert found["deployment"].state is State.FAULT
    assert "traffic" in found["deployment"].said
    assert "no deployment green" in named["deployment"].said


def test_another_deployment_answers() -> None:
    reply = Reply(body=ANSWER.body, headers={"azureml-model-deployment": "blue"})
    with StubEndpoint(reply) as stub:
        found = told(stub, deployment="green")
    assert found["deployment"].state is State.FAULT
    assert "blue answered" in found["deployment"].said


def test_a_model_that_fails_with_a_valid_key() -> None:
    with StubEndpoint(Reply(424, b"{}")) as stub:
        found = told(stub)
    assert found["one token"].state is State.FAULT
    assert "log" in found["one token"].fix
    assert found["key"].state is State.OK


def health(url: str, seconds: float = SECONDS, slow_ms: float = 60_000) -> dict[str, Finding]:
    return by_check(endpoint_findings(settings(url), seconds, slow_ms))


def test_health_and_latency() -> None:
    with StubEndpoint(Reply(body=b"healthy")) as stub:
        found = health(stub.url())
    assert states(found) == {"health": "ok", "latency": "ok"}
    assert {seen.path for seen in stub.seen} == {"/"}
    assert stub.connections == 1


def test_an_endpoint_that_is_not_well() -> None:
    with StubEndpoint(Reply(503, b"")) as stub:
        found = health(stub.url())
    assert found["health"].state is State.FAULT
    assert "503" in found["health"].said


@pytest.mark.parametrize(
    ("status", "told"),
    [(404, "no health route"), (501, "no health route"), (403, "you lack the permission")],
)
def test_an_endpoint_without_a_health_page(status: int, told: str) -> None:
    with StubEndpoint(Reply(status, b"")) as stub:
        found = health(stub.url())
    assert found["health"].state is State.SKIPPED
    assert told in found["health"].said


def test_an_endpoint_that_is_far_away() -> None:
    with StubEndpoint(Reply(delay=0.02)) as stub:
        found = health(stub.url(), slow_ms=1)
    assert found["latency"].state is State.WARNING
    assert "region" in found["latency"].fix


def test_an_endpoint_that_does_not_answer_in_time() -> None:
    with StubEndpoint(Reply(delay=5)) as stub:
        found = health(stub.url(), seconds=0.2)
    assert found["health"].state is State.FAULT
    assert "--timeout" in found["health"].fix


def test_nobody_listens() -> None:
    with no_listener() as url:
        found = health(url)
        asked = ask(settings(url), SECONDS)
    assert states(found) == {"health": "fault", "latency": "skipped"}
    assert "phi3 up" in found["health"].fix
    assert set(states(by_check(connection_findings(asked))).values()) == {"skipped"}
    assert token_finding(asked).state is State.FAULT


@pytest.mark.parametrize(
    ("url", "key", "shape", "https"),
    [
        ("https://phi3.example.com/score", "k", "ok", "ok"),
        ("http://127.0.0.1:1/score", "k", "ok", "ok"),
        ("http://phi3.example.com/score", "k", "ok", "fault"),
        ("https://phi3.example.com/", "k", "fault", "skipped"),
        ("https://phi3.example.com/score", "", "fault", "skipped"),
        ("http://phi3.example.com/score", "a b", "fault", "fault"),
    ],
)
def test_shape_and_https(
    url: str, key: str, shape: str, https: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3_ENDPOINT", url)
    monkeypatch.setenv("PHI3_KEY", key)
    found = by_check(Connection("any").checks())
    assert states(found) == {"present": "ok", "shape": shape, "https": https}
    assert all(each.fix for each in found.values() if each.state is State.FAULT)


def test_a_connection_that_is_named_outranks_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `phi3 chat --run` does: else `doctor --run other` would praise another endpoint."""
    monkeypatch.setenv("PHI3_ENDPOINT", "https://phi3.example.com/score")
    monkeypatch.setenv("PHI3_KEY", "k")
    stored = SimpleNamespace(
        configs={"endpoint": "http://127.0.0.1:1/score"}, secrets={"key": "other"}
    )
    monkeypatch.setattr(store, "stored_connection", lambda _name: stored)
    monkeypatch.setattr(store, "database", lambda: Path("pf.sqlite"))
    found = by_check(Connection("phi3_connection_other", chosen=True).checks())
    assert "phi3_connection_other" in found["present"].said
    assert "127.0.0.1" in found["shape"].said


def test_the_flow_names_its_connection() -> None:
    assert connection_of(FlowSource.read(ROOT / "flows/phi3_chat").dag) == "phi3_connection"
    assert connection_of({"nodes": [{"inputs": {"connection": "${inputs.c}"}}]}) is None


def test_a_folder_that_is_no_flow(tmp_path: Path) -> None:
    found = by_check(flow(tmp_path))
    assert states(found)["folder"] == "fault"
    assert states(found)["validate"] == states(found)["tools"] == "skipped"


def test_without_prompt_flow_the_flow_is_not_checked() -> None:
    found = by_check(flow(ROOT / "flows/phi3_chat", promptflow_there=False))
    assert states(found)["validate"] == states(found)["tools"] == "skipped"
    assert "not installed" in found["tools"].said


def test_a_tool_that_prompt_flow_did_not_find(tmp_path: Path) -> None:
    source = FlowSource.read(ROOT / "flows/phi3_chat")
    assert tools_of(source, tmp_path).state is State.SKIPPED
    (tmp_path / ".promptflow").mkdir()
    (tmp_path / ".promptflow" / "flow.tools.json").write_text('{"code": {}, "package": {}}')
    found = tools_of(source, tmp_path)
    assert found.state is State.FAULT
    assert "integrate_with_promptflow.py" in found.said


def test_the_package_tool_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    found = package_tool()
    assert found.state is State.WARNING
    assert "pip install" in found.fix


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PfHome]:
    with pf_home(tmp_path_factory.mktemp("doctor") / "home") as state:
        yield state


def doctor(home: PfHome, *arguments: str) -> Done:
    return home.run(["python", "-m", "phi3_training.cli", "doctor", *arguments])


def report(done: Done) -> dict[str, dict[str, Any]]:
    return {each["check"]: each for each in json.loads(done.out)["findings"]}


def test_the_whole_report_of_a_valid_flow(home: PfHome) -> None:
    """One line each, exit 0, nothing left in the flow's folder, and the key nowhere."""
    with endpoint(KEY) as served:
        home.connect(served.url, KEY)
        folder = home.copy_flow()
        before = sorted(folder.rglob("*"))
        done = doctor(home, "--flow", str(folder))
    assert done.code == 0, done.text
    lines = done.out.splitlines()
    assert lines[-1].startswith("Healthy: ")
    checks = [line[14:28].strip() for line in lines[:-1]]
    assert len(checks) == len(set(checks))
    assert {"python", "keyring", "telemetry", "service", "present", "shape", "https", "key",
            "dialect", "deployment", "health", "latency", "one token", "folder", "validate",
            "tools", "package tool", "wheel", "tokens"} <= set(checks)  # fmt: skip
    assert sorted(folder.rglob("*")) == before
    assert KEY not in done.text


def test_the_whole_report_of_a_broken_flow(home: PfHome, tmp_path: Path) -> None:
    """Every fault in one go: no such connection, and code that cannot be imported."""
    (tmp_path / "flow.dag.yaml").write_text(
        "inputs: {}\noutputs: {}\nnodes:\n- name: ask\n  type: python\n"
        "  source: {type: code, path: ask.py}\n  inputs: {connection: nobodys}\n"
    )
    (tmp_path / "ask.py").write_text("import not_installed_anywhere\n")
    done = doctor(home, "--flow", str(tmp_path), "-o", "json")
    assert done.code == 1, done.text
    assert json.loads(done.out)["ok"] is False
    found = report(done)
    assert found["present"]["state"] == "fault"
    assert "nobodys" in found["present"]["said"]
    assert "phi3 connect" in found["present"]["fix"]
    for check in ("shape", "https", "key", "dialect", "deployment", "health", "one token"):
        assert found[check]["state"] == "skipped"
        assert "no connection" in found[check]["said"]
    assert found["validate"]["state"] == "fault"
    assert "not_installed_anywhere" in found["validate"]["said"]


def test_a_timeout_must_be_a_time(home: PfHome) -> None:
    done = doctor(home, "--timeout", "0")
    assert done.code == 2
    assert "--timeout" in done.err


def test_an_outdated_package_from_the_command_line(home: PfHome, tmp_path: Path) -> None:
    """Another filelock's metadata, found first, is all that the check looks at."""
    metadata = tmp_path / "filelock-3.30.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: filelock\nVersion: 3.30.1\n")
    path = os.pathsep.join([str(tmp_path), home.env.get("PYTHONPATH", "")])
    command = ["python", "-m", "phi3_training.cli", "doctor"]
    env = {"PYTHONPATH": path, "PHI3_ENDPOINT": "http://127.0.0.1:1/score", "PHI3_KEY": KEY}
    done = home.run(command, env=env)
    assert done.code == 1, done.text
    line = next(line for line in done.out.splitlines() if "filelock" in line)
    assert line.startswith("✗")
    assert 'Fix: pip install "filelock>=3.20,<3.30"' in line
    assert done.out.splitlines()[-1].startswith("Not healthy: ")


def test_a_connection_without_a_key_signs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auth: entra`: every question carries azure-identity's token, the health page too."""
    identity: Any = ModuleType("azure.identity")
    identity.DefaultAzureCredential = lambda: None
    identity.get_bearer_token_provider = lambda _credential, _scope: lambda: "token-7"
    monkeypatch.setitem(sys.modules, "azure.identity", identity)
    with StubEndpoint(ANSWER) as stub:
        given = {"endpoint": stub.url(), "auth": "entra"}
        entra = ConnectionSettings.from_connection(given)
        assert token_finding(ask(entra, SECONDS)).state is State.OK
        found = by_check(endpoint_findings(entra, SECONDS, 10_000))
        assert states(found)["health"] == "ok"
        assert {seen.headers.get("authorization") for seen in stub.seen} == {"Bearer token-7"}
