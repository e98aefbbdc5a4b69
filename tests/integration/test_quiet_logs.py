"""What people say and hear is in no log record above DEBUG, however the call ends."""

from __future__ import annotations

import json
import logging

import pytest
from tests.integration.stub_endpoint import KEY, OPENAI, SSE, Reply, StubEndpoint, chunk

from phi3_tool import Phi3Client, Phi3Error

QUESTION = "quokka-question-81"
ANSWER = "wombat-answer-92"
MESSAGES = [{"role": "user", "content": QUESTION}]
GOOD = Reply(body=json.dumps({"output": ANSWER}).encode())


@pytest.mark.parametrize(
    "replies",
    [
        (GOOD,),
        (Reply(503, ANSWER.encode()), GOOD),
        (Reply(401, json.dumps({"message": ANSWER}).encode()),),
        (Reply(424, ANSWER.encode()),),
        (Reply(body=ANSWER.encode()),),
        (Reply(body=GOOD.body, missing=9),),
    ],
    ids=["answered", "retried", "refused", "failed", "unreadable", "cut"],
)
def test_calls_log_neither_question_nor_answer(
    replies: tuple[Reply, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with StubEndpoint(*replies) as stub, Phi3Client(stub.url(), KEY, backoff=0) as client:
        try:
            assert client.chat(MESSAGES).text == ANSWER
        except Phi3Error:
            assert replies[-1] is not GOOD
    assert_quiet(caplog)
    assert any(record.levelno == logging.DEBUG for record in caplog.records)  # it was listened to


def test_streams_log_neither(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reply = Reply(headers=SSE, chunks=((0, chunk(ANSWER)), (0, b"data: [DONE]\n\n")))
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(OPENAI), KEY) as client:
        assert "".join(client.stream(MESSAGES)) == ANSWER
    assert_quiet(caplog)


def assert_quiet(caplog: pytest.LogCaptureFixture) -> None:
    said = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert not [line for line in said if QUESTION in line or ANSWER in line]
