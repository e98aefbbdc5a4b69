"""Every error of phi3_tool, provoked by a real server, with its time bound."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from tests.integration.stub_endpoint import (
    KEY,
    OPENAI,
    QUESTION,
    SSE,
    Reply,
    StubEndpoint,
    chunk,
    failure,
    no_listener,
    within,
)

from phi3_tool import (
    AuthenticationError,
    ConfigurationError,
    EndpointNotFoundError,
    EndpointTimeoutError,
    ModelError,
    Phi3Client,
    RequestRejectedError,
    ServiceError,
    ThrottledError,
    UnreadableAnswerError,
)


def test_configuration_error_before_anything_is_sent() -> None:
    with within(1), pytest.raises(ConfigurationError) as caught:
        Phi3Client("http://example.com/score", KEY)
    assert "https" in str(caught.value)


def test_a_wrong_key_fails_in_under_a_second() -> None:
    """One attempt, no waiting, and the message names the fix."""
    reply = Reply(401, b'{"error": {"message": "Invalid key"}}', {"Retry-After": "20"})
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(), KEY) as client, within(1):
        error = failure(client)
        assert type(error) is AuthenticationError
        assert (error.status, error.attempts) == (401, 1)
        assert "phi3 connect" in str(error)
        assert len(stub.seen) == 1


def test_a_wrong_key_fails_fast_even_if_the_body_drips() -> None:
    reply = Reply(401, b'{"error": {"message": "' + b"x" * 500, drip=0.05)
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(), KEY) as client, within(2):
        assert type(failure(client)) is AuthenticationError


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_these_are_never_tried_again(status: int) -> None:
    with StubEndpoint(Reply(status)) as stub, Phi3Client(stub.url(), KEY) as client, within(1):
        kind = {401: AuthenticationError, 403: AuthenticationError, 404: EndpointNotFoundError}
        assert type(failure(client)) is kind.get(status, RequestRejectedError)
        assert len(stub.seen) == 1


def test_throttled_after_all_retries() -> None:
    with StubEndpoint(Reply(429)) as stub:
        client = Phi3Client(stub.url(), KEY, max_retries=3, backoff=0.01)
        with within(2):
            error = failure(client)
        assert type(error) is ThrottledError
        assert error.attempts == len(stub.seen) == 4


def test_throttled_twice_then_answered() -> None:
    busy = Reply(429, headers={"Retry-After": "0"})
    with StubEndpoint(busy, busy, Reply()) as stub, Phi3Client(stub.url(), KEY) as client:
        reply = client.chat(QUESTION)
        assert (reply.text, reply.attempts) == ("ok", 3)
        ids = {seen.headers["x-ms-client-request-id"] for seen in stub.seen}
        assert ids == {reply.request_id}


def test_retry_after_is_obeyed() -> None:
    for header in ({"Retry-After": "1"}, {"x-ms-retry-after-ms": "600", "Retry-After": "20"}):
        with (
            StubEndpoint(Reply(503, headers=header), Reply()) as stub,
            Phi3Client(stub.url(), KEY, backoff=0) as client,
        ):
            started = time.monotonic()
            assert client.chat(QUESTION).attempts == 2
            assert 0.55 < time.monotonic() - started < 15  # neither 0 nor the 20 of Retry-After


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    """The caller hears of the throttling at once, not of a timeout later."""
    with StubEndpoint(Reply(429, headers={"Retry-After": "9"})) as stub:
        client = Phi3Client(stub.url(), KEY, deadline=3)
        with within(1):
            assert type(failure(client)) is ThrottledError
        assert len(stub.seen) == 1


def test_deadline_bounds_the_retries() -> None:
    with StubEndpoint(Reply(503)) as stub:
        client = Phi3Client(stub.url(), KEY, deadline=1, max_retries=1000, backoff=0.3)
        with within(1.5):
            assert type(failure(client)) is ServiceError


def test_endpoint_timeout_is_tried_once_more() -> None:
    with (
        StubEndpoint(Reply(408)) as stub,
        Phi3Client(stub.url(), KEY, backoff=0) as client,
        within(1),
    ):
        assert type(failure(client)) is EndpointTimeoutError
        assert len(stub.seen) == 2


def drip_headers(connection: socket.socket, stopping: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not stopping.wait(0.05):
        connection.sendall(b"X: y\r\n"[:1])


def drip_one_chunk(connection: socket.socket, stopping: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffff\r\n")
    while not stopping.wait(0.05):
        connection.sendall(b" ")


def late_then_silent(connection: socket.socket, stopping: threading.Event) -> None:
    """The socket's own timeout restarts with each byte; the deadline does not."""
    stopping.wait(0.7)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    stopping.wait(30)


def flood(connection: socket.socket, stopping: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    while not stopping.wait(0.001):
        connection.sendall(piece)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(delay=30),
        Reply(body=b'{"output": "' + b"x" * 5000, drip=0.05),
        Reply(raw=drip_headers),
        Reply(raw=drip_one_chunk),
        Reply(raw=late_then_silent),
        Reply(raw=flood),
    ],
    ids=["silent", "drips body", "drips headers", "drips a chunk", "late then silent", "flood"],
)
def test_the_deadline_holds(reply: Reply) -> None:
    """Whatever a server does, a deadline of 1 s ends the call by 1.5 s, with one attempt."""
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(), KEY, deadline=1) as client:
        with within(1.5):
            error = failure(client)
        assert type(error) is EndpointTimeoutError
        assert "deadline of 1 s" in str(error)
        assert len(stub.seen) == 1


def test_the_deadline_holds_in_mid_stream() -> None:
    slow = Reply(headers=SSE, chunks=tuple((0.1, chunk("a")) for _ in range(100)))
    with StubEndpoint(slow) as stub, Phi3Client(stub.url(OPENAI), KEY, deadline=1) as client:
        with within(1.5), pytest.raises(EndpointTimeoutError):
            list(client.stream(QUESTION))
        assert stub.hung_up.wait(5)


def flood_of_events(connection: socket.socket, stopping: threading.Event) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    while not stopping.is_set():
        connection.sendall(b": still thinking\n\n" * 1000)


def test_the_deadline_holds_where_data_never_pauses() -> None:
    with (
        StubEndpoint(Reply(raw=flood_of_events)) as stub,
        Phi3Client(stub.url(OPENAI), KEY, deadline=0.5) as client,
        within(1.5),
        pytest.raises(EndpointTimeoutError),
    ):
        list(client.stream(QUESTION))


def test_read_timeout_ends_a_silence() -> None:
    with StubEndpoint(Reply(delay=30)) as stub:
        with within(1), Phi3Client(stub.url(), KEY, read_timeout=0.3) as client:
            error = failure(client)
        assert type(error) is EndpointTimeoutError
        assert "read_timeout" in str(error)


def test_connect_timeout() -> None:
    """A listener whose queue is full never completes the handshake."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = []
        for _ in range(4):
            fill = socket.socket()
            fill.setblocking(False)
            fill.connect_ex(listener.getsockname())
            waiting.append(fill)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/score"
        with (
            Phi3Client(url, KEY, connect_timeout=0.2, max_retries=1, backoff=0) as client,
            within(1.5),
        ):
            error = failure(client)
        for fill in waiting:
            fill.close()
    assert type(error) is EndpointTimeoutError
    assert error.attempts == 2
    assert "connect_timeout" in str(error)


def test_model_error_with_the_inner_status() -> None:
    headers = {
        "ms-azureml-model-error-statuscode": "500",
        "ms-azureml-model-error-reason": "model_error",
    }
    with (
        StubEndpoint(Reply(424, b'{"message": "boom"}', headers)) as stub,
        Phi3Client(stub.url(), KEY, max_retries=1, backoff=0, deployment="blue") as client,
        within(1),
    ):
        error = failure(client)
    assert type(error) is ModelError
    assert (error.status, error.inner_status, error.reason) == (424, 500, "model_error")
    for fact in ("inner status 500", "deployment blue", "after 2 attempts", "boom"):
        assert fact in str(error)


def test_model_error_inside_a_200() -> None:
    with (
        StubEndpoint(Reply(body=b"{}")) as stub,
        Phi3Client(stub.url(), KEY) as client,
        within(1),
    ):
        error = failure(client)
        assert type(error) is ModelError
        assert (error.status, len(stub.seen)) == (200, 1)


def test_no_connection_is_a_service_error_after_retries() -> None:
    with (
        no_listener() as url,
        Phi3Client(url, KEY, max_retries=2, backoff=0.01) as client,
        within(1),
    ):
        error = failure(client)
    assert type(error) is ServiceError
    assert error.attempts == 3
    assert "refused" in str(error)
    assert "phi3 up" in str(error)


def test_a_server_that_hangs_up_is_tried_again() -> None:
    rude = Reply(raw=lambda connection, _: connection.close())
    with StubEndpoint(rude, Reply()) as stub, Phi3Client(stub.url(), KEY, backoff=0) as client:
        assert client.chat(QUESTION).attempts == 2


@pytest.mark.parametrize(
    "reply",
    [
        Reply(missing=20),
        Reply(chunks=((0, b'{"output": "o'),), broken_chunks=True),
        Reply(body=b'{"output": "o'),
        Reply(body=b"<html>"),
    ],
    ids=["short body", "broken chunks", "short json", "html"],
)
def test_an_answer_cut_short_is_unreadable(reply: Reply) -> None:
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(), KEY) as client, within(1):
        error = failure(client)
        assert type(error) is UnreadableAnswerError
        assert len(stub.seen) == 1


def test_an_endless_answer_is_refused() -> None:
    reply = Reply(chunks=tuple((0, b" " * 2**20) for _ in range(20)))
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(), KEY) as client, within(5):
        error = failure(client)
        assert type(error) is UnreadableAnswerError
        assert "does not end" in str(error)


def test_a_stream_broken_in_the_middle() -> None:
    reply = Reply(headers=SSE, chunks=((0, chunk("Bill")),), broken_chunks=True)
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(OPENAI), KEY) as client:
        stream = client.stream(QUESTION)
        assert next(stream) == "Bill"
        with within(1), pytest.raises(UnreadableAnswerError) as caught:
            next(stream)
        assert caught.value.request_id == stub.seen[0].headers["x-ms-client-request-id"]
