"""The endpoint over real sockets: limits, clients that leave, forty conversations at once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from tests.integration.misbehaving import cut, delayed
from tests.integration.server_fixture import AUTH, PAIRS, Served, score_body, served

from phi3_training.serve.engines.base import Engine

pytest_plugins = ("tests.integration.server_plugin",)


@pytest.fixture(scope="module")
def endpoint(engine: Engine) -> Iterator[Served]:
    with served(engine) as endpoint:
        yield endpoint


def test_forty_at_once_get_their_own_answers(endpoint: Served) -> None:
    pairs = PAIRS[:40]
    alone = [endpoint.score(question, max_new_tokens=40).json()["output"] for question, _ in pairs]
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda pair: endpoint.score(pair[0], max_new_tokens=40), pairs))
    assert [answer.status_code for answer in answers] == [200] * 40
    assert [answer.json()["output"] for answer in answers] == alone == [a for _, a in pairs]
    assert endpoint.wait_idle()


def test_two_conversations_with_history_at_once(endpoint: Served) -> None:
    def talk(numbers: tuple[int, int]) -> str:
        first, second = (PAIRS[number] for number in numbers)
        messages = [
            {"role": "user", "content": first[0]},
            {"role": "assistant", "content": first[1]},
            {"role": "user", "content": second[0]},
        ]
        body = {"input_data": {"input_string": messages, "parameters": {"max_new_tokens": 30}}}
        return str(endpoint.post("/score", body).json()["output"])

    alone = [talk((0, 1)), talk((5, 9))]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, [(0, 1), (5, 9)] * 4)) == alone * 4


def test_streams_at_once_do_not_mix(endpoint: Served) -> None:
    def stream(pair: tuple[str, str]) -> str:
        body = {"messages": [{"role": "user", "content": pair[0]}], "stream": True}
        answer = endpoint.post("/v1/chat/completions", body)
        events = [line[6:] for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
        return "".join(delta.get("content", "") for delta in deltas)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(stream, PAIRS[:20])) == [answer for _, answer in PAIRS[:20]]


def endless(stream: bool) -> bytes:
    body = {
        "messages": [{"role": "user", "content": PAIRS[0][0]}],
        "max_tokens": 490,
        "ignore_eos": True,
        "stream": stream,
    }
    return json.dumps(body).encode()


def raw_post(endpoint: Served, path: str, body: bytes, length: int | None = None) -> socket.socket:
    port = int(endpoint.url.rsplit(":", 1)[1])
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: local\r\nAuthorization: {AUTH['Authorization']}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(endpoint: Served, stream: bool) -> None:
    for _ in range(5):
        connection = raw_post(endpoint, "/v1/chat/completions", endless(stream))
        if stream:
            assert b"200" in connection.recv(200)
        connection.close()
    assert endpoint.wait_idle(2.0), "an answer that nobody reads is still being written"
    assert endpoint.score(PAIRS[3][0]).json()["output"] == PAIRS[3][1]


def test_a_client_that_leaves_while_sending(endpoint: Served) -> None:
    raw_post(endpoint, "/score", b'{"input', length=1000).close()
    assert endpoint.score(PAIRS[4][0]).json()["output"] == PAIRS[4][1]


def test_a_slow_sender_is_408(engine: Engine) -> None:
    with served(engine, request_timeout_ms=200) as endpoint:
        started = time.monotonic()
        connection = raw_post(endpoint, "/score", b'{"input', length=1000)
        assert b"408" in connection.recv(200)
        assert time.monotonic() - started < 30
        connection.close()


def test_a_long_answer_is_408(engine: Engine) -> None:
    with served(engine, request_timeout_ms=1000, inside=delayed(30, times=1)) as endpoint:
        answer = endpoint.score(PAIRS[0][0])
        assert (answer.status_code, answer.text) == (408, "upstream request timeout")
        assert endpoint.score(PAIRS[0][0]).status_code == 200


def test_too_large_requests_are_413_chunked_or_not(endpoint: Served) -> None:
    whole = endpoint.post("/score", b"x" * 3_000_000)
    assert whole.status_code == 413
    parts = (b"x" * 100_000 for _ in range(30))
    chunked = requests.post(endpoint.url + "/score", data=parts, headers=AUTH, timeout=30)
    assert chunked.status_code == 413


def test_overload_is_429_and_passes(engine: Engine) -> None:
    busy = served(engine, max_concurrent_requests_per_instance=2, inside=delayed(0.3))
    with busy as endpoint:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: endpoint.score(PAIRS[0][0]), range(12)))
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(200) >= 4
        assert set(statuses) == {200, 429}
        assert endpoint.score(PAIRS[0][0]).status_code == 200


def test_a_connection_is_used_again(endpoint: Served) -> None:
    with requests.Session() as session:
        for question, answer in PAIRS[:5]:
            response = session.post(
                endpoint.url + "/score", json=score_body(question), headers=AUTH, timeout=10
            )
            assert response.json() == {"output": answer}


def test_a_cut_answer_looks_cut(engine: Engine) -> None:
    with served(engine, inside=cut()) as endpoint, pytest.raises(requests.RequestException):
        endpoint.score(PAIRS[0][0])


@pytest.mark.parametrize("sent", [b"", b"POST /score HTTP/1.1\r\nHost: loc"])
def test_half_open_connections_are_closed(engine: Engine, sent: bytes) -> None:
    with served(engine, idle_seconds=1) as endpoint:
        port = int(endpoint.url.rsplit(":", 1)[1])
        waiting = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(20)]
        for connection in waiting:
            connection.sendall(sent)
        for connection in waiting:
            assert connection.recv(100) == b"", "the endpoint did not close it"
            connection.close()
        assert endpoint.score(PAIRS[0][0]).json()["output"] == PAIRS[0][1]


def test_half_a_second_request_is_closed(engine: Engine) -> None:
    with served(engine, idle_seconds=1) as endpoint:
        body = json.dumps(score_body(PAIRS[0][0])).encode()
        connection = raw_post(endpoint, "/score", body)
        connection.settimeout(30)
        assert b"200" in connection.recv(4000)
        connection.sendall(b"POST /score HTT")
        assert connection.recv(100) == b""
        connection.close()


def test_a_slow_answer_is_no_idle_connection(engine: Engine) -> None:
    with served(engine, idle_seconds=1, inside=delayed(2.5)) as endpoint:
        assert endpoint.score(PAIRS[0][0]).json()["output"] == PAIRS[0][1]
