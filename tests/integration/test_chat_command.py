"""`phi3 chat` with an endpoint that the environment names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.integration.stub_endpoint import KEY, OPENAI, SSE, Reply, StubEndpoint, chunk

from phi3_training.cli import main
from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, sync

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


def test_rag_asks_with_the_passages_and_cites_them(
    no_endpoint: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "tents.md").write_text("# Tents\n\nThe Mossback costs 240 dollars.\n")
    for number in range(9):
        (documents / f"{number}.md").write_text(f"Shop {number} opens at {number} o'clock.\n")
    index = tmp_path / "runs/documents/rag/index.sqlite"
    sync(index, [documents], Chosen(None, {}, ""), no_progress)
    no_endpoint.setenv("PHI3_INDEX", "")  # the command sets it; put back afterwards
    pieces = ((0.0, chunk("It costs 240 dollars [1].")), (0.0, b"data: [DONE]\n\n"))
    with StubEndpoint(Reply(headers=SSE, chunks=pieces)) as stub:
        no_endpoint.setenv("PHI3_ENDPOINT", stub.url(OPENAI))
        no_endpoint.setenv("PHI3_KEY", KEY)
        runs = ["--runs", str(tmp_path / "runs")]
        assert main(["chat", "--rag", "What does the Mossback cost?", *runs]) == 0
        (message,) = json.loads(stub.seen[-1].body)["messages"]
        assert "[1] Tents: The Mossback costs 240 dollars." in message["content"]
        assert message["content"].endswith("Question: What does the Mossback cost?")
        assert "Sources:\n[1] tents.md (Tents)" in capsys.readouterr().out
        assert main(["chat", "--rag", "Who painted the chapel in Rome?", *runs]) == 0
        assert len(stub.seen) == 1
    assert "That is not in the documents." in capsys.readouterr().out


def test_rag_without_an_index_names_the_command(
    no_endpoint: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    no_endpoint.setenv("PHI3_INDEX", "")
    no_endpoint.setenv("PHI3_ENDPOINT", "http://127.0.0.1:9/score")
    no_endpoint.setenv("PHI3_KEY", KEY)
    command = ["chat", "--rag", "--documents", "nothing", "Hi?", "--runs", str(tmp_path)]
    assert main(command) == 2
    assert "phi3 rag index FOLDER" in capsys.readouterr().err
