"""Streams, headers, pooled connections and many threads, over real sockets."""

from __future__ import annotations

import gc
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.integration.stub_endpoint import (
    KEY,
    OPENAI,
    QUESTION,
    SSE,
    Reply,
    Seen,
    StubEndpoint,
    chunk,
    failure,
    within,
)

from phi3_tool import (
    AuthenticationError,
    ConfigurationError,
    Phi3Client,
    RequestRejectedError,
    ServiceError,
)


def test_pieces_arrive_as_they_are_sent() -> None:
    gaps = ((0, chunk("a")), (0.4, chunk("b")), (0.4, b"data: [DONE]\n\n"))
    with (
        StubEndpoint(Reply(headers=SSE, chunks=gaps)) as stub,
        Phi3Client(stub.url(OPENAI), KEY) as client,
    ):
        stream = client.stream(QUESTION, max_new_tokens=5)
        with within(0.35):
            assert next(stream) == "a"
        assert list(stream) == ["b"]
        assert json.loads(stub.seen[0].body)["stream"] is True


def test_stream_errors_are_raised_by_the_call_itself() -> None:
    with (
        StubEndpoint(Reply(401)) as stub,
        Phi3Client(stub.url(OPENAI), KEY) as client,
        pytest.raises(AuthenticationError),
    ):
        client.stream(QUESTION)


@pytest.mark.parametrize("how", ["close", "close unread", "forget"])
def test_leaving_a_stream_hangs_up(how: str) -> None:
    """Closing, or just dropping, the generator ends the server's work."""
    endless = Reply(headers=SSE, chunks=tuple((0.02, chunk("a")) for _ in range(500)))
    with StubEndpoint(endless) as stub, Phi3Client(stub.url(OPENAI), KEY) as client:
        stream = client.stream(QUESTION)
        if how != "close unread":
            next(stream)
        if how == "forget":
            del stream
            gc.collect()
        else:
            stream.close()
        assert stub.hung_up.wait(3)


def test_what_is_sent() -> None:
    with StubEndpoint(Reply(headers={"azureml-model-deployment": "green"})) as stub:
        with Phi3Client(stub.url("/score?a=b"), KEY, deployment="blue") as client:
            reply = client.chat(QUESTION, request_id="my-id", max_new_tokens=4)
        seen = stub.seen[0]
    assert (reply.request_id, reply.deployment, seen.path) == ("my-id", "green", "/score?a=b")
    assert seen.headers["x-ms-client-request-id"] == "my-id"
    assert seen.headers["azureml-model-deployment"] == "blue"
    assert seen.headers["content-type"] == "application/json"
    assert json.loads(seen.body)["input_data"]["input_string"] == QUESTION
    with pytest.raises(RequestRejectedError), Phi3Client(stub.url(), KEY) as client:
        client.chat(QUESTION, request_id="x" * 101)


def test_parameters_beyond_openai_ask_to_be_passed_through() -> None:
    with (
        StubEndpoint(Reply(body=b'{"choices": [{"text": "ok"}]}')) as stub,
        Phi3Client(stub.url("/v1"), KEY) as client,
    ):
        client.chat(QUESTION, max_new_tokens=5, temperature=0)
        client.chat(QUESTION, top_k=5)
    assert "extra-parameters" not in stub.seen[0].headers
    assert stub.seen[1].headers["extra-parameters"] == "pass-through"
    assert stub.seen[0].path == OPENAI


def test_a_stream_leaves_its_connection_for_the_next() -> None:
    whole = ((0.0, chunk("a")), (0.02, chunk("b")), (0.0, b"data: [DONE]\n\n"))
    with (
        StubEndpoint(Reply(headers=SSE, chunks=whole)) as stub,
        Phi3Client(stub.url(OPENAI), KEY) as client,
    ):
        for _ in range(3):
            assert list(client.stream(QUESTION)) == ["a", "b"]
        assert stub.connections == 1


def test_a_stream_that_stays_open_after_its_end_is_left() -> None:
    open_end = ((0.0, chunk("a")), (0.0, b"data: [DONE]\n\n"), (60.0, b": still here\n\n"))
    with (
        StubEndpoint(Reply(headers=SSE, chunks=open_end)) as stub,
        Phi3Client(stub.url(OPENAI), KEY) as client,
        within(30),
    ):
        assert list(client.stream(QUESTION)) == ["a"]


def test_connections_are_used_again() -> None:
    with StubEndpoint() as stub, Phi3Client(stub.url(), KEY) as client:
        for _ in range(20):
            client.chat(QUESTION)
        assert stub.connections == 1


def test_forty_threads_share_a_client_without_mixing(caplog: pytest.LogCaptureFixture) -> None:
    def script(seen: Seen) -> Reply:
        asked = json.loads(seen.body)["input_data"]["input_string"][-1]["content"]
        told = {"output": f"{asked}|{seen.headers['x-ms-client-request-id']}"}
        return Reply(body=json.dumps(told).encode(), delay=0.01)

    def ask(number: int) -> bool:
        ours = f"question {number} of a thread"
        reply = client.chat([{"role": "user", "content": ours}], request_id=f"id-{number}")
        return (reply.text, reply.request_id) == (f"{ours}|id-{number}", f"id-{number}")

    with StubEndpoint(script=script) as stub, Phi3Client(stub.url(), KEY) as client:
        with ThreadPoolExecutor(40) as pool:
            assert all(pool.map(ask, range(400)))
        assert len(stub.seen) == 400
        assert stub.connections <= 40
    # urllib3 warns when a pool is too small for its threads.
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_close_wakes_a_waiting_call() -> None:
    with StubEndpoint(Reply(503, headers={"Retry-After": "20"})) as stub:
        client = Phi3Client(stub.url(), KEY)
        threading.Timer(0.3, client.close).start()
        with within(2):
            assert type(failure(client)) is ServiceError
        assert type(failure(client)) is ConfigurationError
