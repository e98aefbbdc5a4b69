"""The deployments that the tool offers: names where the endpoint tells them, else why not."""

from __future__ import annotations

import json

import pytest
from tests.integration.stub_endpoint import KEY, OPENAI, Reply, StubEndpoint, no_listener

from phi3_tool.deployments import choices, not_listed

pytest.importorskip("promptflow.core", reason="the extra `flow` is not installed")

NAMES = {"object": "list", "data": [{"id": "phi3"}, {"id": "french"}, {"id": 7}, "odd"]}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PHI3_ENDPOINT", "PHI3_KEY"):
        monkeypatch.delenv(name, raising=False)


def offered(endpoint: str, key: str = KEY) -> list[dict[str, str]]:
    from promptflow._core.tools_manager import retrieve_tool_func_result
    from promptflow.connections import CustomConnection

    stored = CustomConnection(configs={"endpoint": endpoint}, secrets={"key": key})
    # As an editor does it: by the path in the tool's YAML, with Prompt flow's check of the result.
    path = "phi3_tool.chat.list_deployments"
    found = retrieve_tool_func_result("dynamic_list", path, {"connection": stored})
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/score", "/v1/models"),
        (OPENAI, "/v1/models"),
        ("/v1", "/v1/models"),
        ("/chat/completions", "/v1/models"),
        ("/azure/score", "/azure/v1/models"),
    ],
)
def test_names_come_from_beside_the_endpoint(path: str, asked: str) -> None:
    with StubEndpoint(Reply(body=json.dumps(NAMES).encode())) as stub:
        found = offered(stub.url(path))
        (seen,) = stub.seen
    assert [entry["value"] for entry in found] == ["", "phi3", "french"]
    assert (seen.path, seen.headers["authorization"]) == (asked, f"Bearer {KEY}")


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply(404, b"not here"), "answered status 404"),
        (Reply(401, f"bad key {KEY}".encode()), "does not accept the key (status 401)"),
        (Reply(302, headers={"Location": "http://127.0.0.1:1/"}), "answered status 302"),
        (Reply(body=b"<html>"), "lists no model"),
        (Reply(body=b'{"data": {}}'), "lists no model"),
        (Reply(body=b"[" * 100_000), "lists no model"),
        (Reply(raw=lambda sock, _: sock.close()), "no answer from"),
        (Reply(missing=10), "no answer from"),
    ],
)
def test_no_list_says_why_and_still_works(reply: Reply, why: str) -> None:
    with StubEndpoint(reply) as stub:
        (entry,) = offered(stub.url())
    assert entry["value"] == ""
    assert "the endpoint chooses" in entry["display_value"]
    assert why in entry["display_value"]
    assert KEY not in entry["display_value"]


def test_nothing_there_is_no_exception() -> None:
    with no_listener() as endpoint:
        (entry,) = offered(endpoint)
    assert "no answer from" in entry["display_value"]


def test_settings_that_cannot_be_used_are_named() -> None:
    (entry,) = offered("http://example.com/score")
    assert "plain http to example.com" in entry["display_value"]


def test_a_connection_that_is_not_there() -> None:
    from phi3_tool.chat import list_deployments

    (nothing,) = list_deployments("")
    assert "choose a connection first" in nothing["display_value"]
    (unknown,) = list_deployments("no_such_connection")
    assert "Prompt flow cannot provide the connection" in unknown["display_value"]


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3_tool.chat import list_deployments

    with StubEndpoint(Reply(body=json.dumps(NAMES).encode())) as stub:
        monkeypatch.setenv("PHI3_ENDPOINT", stub.url())
        monkeypatch.setenv("PHI3_KEY", "from-the-environment")
        assert len(list_deployments("")) == 3
        assert stub.seen[0].headers["authorization"] == "Bearer from-the-environment"


def test_azure_says_where_the_names_are() -> None:
    url = "https://a.eastus.inference.ml.azure.com/v1/models"
    assert "az ml online-deployment list" in not_listed(url, 404)
    assert "az ml" not in not_listed("https://a.example/v1/models", 404)


def test_the_chosen_one_is_asked_for() -> None:
    from promptflow.connections import CustomConnection

    from phi3_tool.chat import phi3_chat

    with StubEndpoint() as stub:
        configs = {"endpoint": stub.url(), "deployment": "blue"}
        stored = CustomConnection(configs=configs, secrets={"key": KEY})
        for deployment in ("", "green"):
            phi3_chat(stored, "Hi", deployment=deployment)
        named = [seen.headers["azureml-model-deployment"] for seen in stub.seen]
    assert named == ["blue", "green"]


def test_choices_need_no_prompt_flow() -> None:
    from phi3_tool import ConnectionSettings

    with StubEndpoint(Reply(body=json.dumps(NAMES).encode())) as stub:
        found = choices(ConnectionSettings(stub.url(), KEY))
    assert [choice.value for choice in found] == ["", "phi3", "french"]
