"""`phi3 chat` with an endpoint that the environment names."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from tests.integration.stub_endpoint import KEY, OPENAI, SSE, Reply, StubEndpoint, chunk

from phi3_training.cli import main

PIECES = ((0.0, chunk("It costs 240 dollars.")), (0.0, b"data: [DONE]\n\n"))
ANSWER = Reply(headers=SSE, chunks=PIECES)


@pytest.fixture
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("PHI3_ENDPOINT", "PHI3_KEY", "PHI3_AUTH"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_key_signs_the_question(
    no_endpoint: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with StubEndpoint(ANSWER) as stub:
        no_endpoint.setenv("PHI3_ENDPOINT", stub.url(OPENAI))
        no_endpoint.setenv("PHI3_KEY", KEY)
        assert main(["chat", "How much?"]) == 0
        assert {seen.headers.get("authorization") for seen in stub.seen} == {f"Bearer {KEY}"}
    assert "240 dollars" in capsys.readouterr().out


def test_without_a_key_a_token_does(
    no_endpoint: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`PHI3_AUTH=entra`: azure-identity's token, as in the flow."""
    identity: Any = ModuleType("azure.identity")
    identity.DefaultAzureCredential = lambda: None
    identity.get_bearer_token_provider = lambda _credential, _scope: lambda: "token-7"
    no_endpoint.setitem(sys.modules, "azure.identity", identity)
    with StubEndpoint(ANSWER) as stub:
        no_endpoint.setenv("PHI3_ENDPOINT", stub.url(OPENAI))
        no_endpoint.setenv("PHI3_AUTH", "entra")
        assert main(["chat", "How much?"]) == 0
        assert {seen.headers.get("authorization") for seen in stub.seen} == {"Bearer token-7"}
    assert "240 dollars" in capsys.readouterr().out
