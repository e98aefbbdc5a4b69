"""Every golden answer file, sent by a real server and read by the client."""

from __future__ import annotations

import pytest
from tests.contract.cases import AnswerCase, answer_cases
from tests.integration.stub_endpoint import Reply, StubEndpoint

import phi3_tool
from phi3_tool import Phi3Client

CASES = {case.name: case for case in answer_cases()}
PATHS = {"score": "/score", "openai": "/v1/chat/completions"}
QUESTION = [{"role": "user", "content": "Who founded Microsoft?"}]


@pytest.mark.parametrize("name", CASES)
def test_answer(name: str) -> None:
    """The answer's text, or the error with its attributes and its number of attempts."""
    case = CASES[name]
    reply = Reply(case.status, case.content, case.headers)
    with (
        StubEndpoint(reply) as stub,
        Phi3Client(stub.url(PATHS[case.dialect]), "k-1", backoff=0, max_retries=1) as client,
    ):
        if case.stream:
            _check_stream(case, client)
        else:
            _check_chat(case, client)
        assert len(stub.seen) == (2 if case.expect.get("retried") else 1)


def _check_chat(case: AnswerCase, client: Phi3Client) -> None:
    if "error" in case.expect:
        with pytest.raises(phi3_tool.Phi3Error) as caught:
            client.chat(QUESTION)
        _check_error(case, caught.value)
        return
    reply = client.chat(QUESTION)
    for name, value in case.expect.items():
        assert getattr(reply, name) == value, name


def _check_stream(case: AnswerCase, client: Phi3Client) -> None:
    pieces: list[str] = []
    if "error" not in case.expect:
        pieces += client.stream(QUESTION)
        assert "".join(pieces) == case.expect["text"]
    else:
        with pytest.raises(phi3_tool.Phi3Error) as caught:
            pieces.extend(client.stream(QUESTION))
        _check_error(case, caught.value)
    assert pieces == case.expect.get("pieces", [])


def _check_error(case: AnswerCase, error: phi3_tool.Phi3Error) -> None:
    assert type(error).__name__ == case.expect["error"], str(error)
    for name in ("status", "inner_status", "reason"):
        if name in case.expect:
            assert getattr(error, name) == case.expect[name], name
    assert error.request_id
    assert error.attempts == (2 if case.expect["retried"] else 1)
    if "x-phi3-reason" in case.headers:
        assert case.headers["x-phi3-reason"] in error.message


def test_every_error_class_has_a_file() -> None:
    """Only what happens without an answer (timeouts, no connection) needs no golden file."""
    named = {case.expect.get("error") for case in CASES.values()}
    tree = {name for name in phi3_tool.__all__ if name.endswith("Error")} - {"Phi3Error"}
    assert tree <= named
