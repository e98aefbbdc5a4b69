"""`phi3 agent serve`: OpenAI's shapes and the flow's, many chats at once, keys and errors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("agent_framework", reason="Agent Framework is in .venv-agent: make agent")

import openai
import requests
import uvicorn
from tests.agent.recorded import KEY, Endpoint

from phi3_agent import MemoryConversations, create_agent
from phi3_agent.serve import Served
from phi3_training.agent.recorder import Reply

OURS = "the-servers-key"
AUTH = {"Authorization": f"Bearer {OURS}"}
Start = Callable[..., Endpoint]


@contextmanager
def served(
    stub: Endpoint, row: str = "a", dialect: Any = "openai", **options: Any
) -> Iterator[str]:
    agent = create_agent(stub.client(row, dialect), **options)
    app = Served(agent, MemoryConversations()).app(OURS)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(api_key=OURS, base_url=f"{url}/v1", max_retries=0)


def messages_of(body: bytes) -> list[dict[str, str]]:
    found = json.loads(body)["messages"]
    assert isinstance(found, list)
    return found


def test_chat_completions_whole_and_streamed(endpoint: Start) -> None:
    stub = endpoint(a=[Reply(text=" white \n"), Reply(pieces=[" a", "b\n"])])
    with served(stub, instructions="Be brief.") as url:
        asked: Any = {"model": "phi3", "messages": [{"role": "user", "content": "Hi"}]}
        whole = client(url).chat.completions.create(**asked, max_completion_tokens=9)
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client(url).chat.completions.create(**asked, stream=True)
        ]
    assert whole.choices[0].message.content == " white \n"
    assert whole.choices[0].finish_reason == "stop"
    assert pieces == [" a", "b\n", ""]
    first, second = (json.loads(body) for body in stub.bodies("a"))
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert first["max_tokens"] == 9
    assert second["stream"] is True


def test_responses_continue_a_conversation(endpoint: Start) -> None:
    stub = endpoint()
    with served(stub) as url:
        api = client(url).responses
        first = api.create(model="phi3", input="one", instructions="Only now.")
        developer: Any = [
            {"role": "developer", "content": "From now on."},
            {"role": "user", "content": [{"type": "input_text", "text": "two"}]},
        ]
        with api.stream(model="phi3", input=developer, previous_response_id=first.id) as events:
            kinds = [event.type for event in events]
            second = events.get_final_response()
        api.create(model="phi3", input="three", previous_response_id=second.id)
        # A branch from the first answer knows nothing of the second.
        api.create(model="phi3", input="other", previous_response_id=first.id, store=False)
        with pytest.raises(openai.BadRequestError) as caught:
            api.create(model="phi3", input="x", previous_response_id="resp_unknown")
    assert caught.value.code == "previous_response_not_found"
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    third, branch = (messages_of(body) for body in stub.bodies("a")[2:])
    assert [message["content"] for message in third] == [
        "From now on.", "one", first.output_text, "two", second.output_text, "three",
    ]  # fmt: skip
    assert [message["content"] for message in branch] == ["one", first.output_text, "other"]


def test_the_flows_own_shape(endpoint: Start) -> None:
    stub = endpoint(a=[Reply(text="It does."), Reply(pieces=["It ", "does."])])
    turn = {"inputs": {"input_data": "one"}, "outputs": {"answer": "two"}}
    asked = {"input_data": "Hi", "chat_history": [turn], "temperature": 1}
    with served(stub) as url:
        whole = requests.post(f"{url}/score", json=asked, headers=AUTH, timeout=30)
        accept = {**AUTH, "Accept": "text/event-stream"}
        streamed = requests.post(f"{url}/score", json=asked, headers=accept, timeout=30)
        wrong = requests.post(f"{url}/score", json={"question": "x"}, headers=AUTH, timeout=30)
    assert whole.json() == {"answer": "It does."}
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line]
    assert events == [{"answer": "It "}, {"answer": "does."}]
    assert wrong.status_code == 400
    assert "input_data" in wrong.json()["error"]["message"]
    assert json.loads(stub.bodies("a")[0])["temperature"] == 1.0


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"tools": [{"type": "function"}], "n": 2}, ["tools", "n must be 1"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["not text"]),
        ({"messages": "Hi"}, ["list of"]),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, ["robot"]),
        ({"temperature": -1}, ["temperature"]),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(
    endpoint: Start, request_: dict[str, Any], named: list[str]
) -> None:
    stub = endpoint()
    body = {"messages": [{"role": "user", "content": "Hi"}], **request_}
    with served(stub) as url:
        path = f"{url}/v1/chat/completions"
        answer = requests.post(path, json=body, headers=AUTH, timeout=30)
    assert answer.status_code == 400
    assert all(word in answer.json()["error"]["message"] for word in named)
    assert stub.bodies("a") == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (Reply(401), 502),  # the endpoint's key, not the caller's
        (Reply(429, headers={"retry-after-ms": "0"}), 429),
        (Reply(400), 400),
        (Reply(501), 502),
    ],
)
def test_the_endpoints_failures(endpoint: Start, reply: Reply, status: int, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    with served(endpoint(a=[reply])) as url:
        path = f"{url}/v1/chat/completions"
        answer = requests.post(path, json=body, headers=AUTH, timeout=30)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert KEY not in answer.text


def test_a_stream_that_breaks_ends_with_an_error(endpoint: Start) -> None:
    broken = Reply(pieces=["one ", "two"], cut=1)
    with served(endpoint(a=[broken])) as url:
        with pytest.raises(openai.APIError, match="cut off"):
            for _ in client(url).chat.completions.create(
                model="phi3", messages=[{"role": "user", "content": "Hi"}], stream=True
            ):
                pass
        with client(url).responses.stream(model="phi3", input="Hi") as events:
            kinds = [event.type for event in events]
    assert kinds[-1] == "response.failed"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_without_the_key_nothing_is_asked(endpoint: Start, headers: dict[str, str]) -> None:
    stub = endpoint()
    with served(stub) as url:
        for path in ("/v1/chat/completions", "/v1/responses", "/score"):
            assert (
                requests.post(url + path, json={}, headers=headers, timeout=30).status_code == 401
            )
        assert requests.get(f"{url}/health", timeout=30).json()["status"] == "ok"
    assert stub.bodies("a") == []


def test_32_chats_at_once_do_not_mix(endpoint: Start) -> None:
    stub = endpoint()

    def post(path: str, body: dict[str, Any]) -> Any:
        answer = requests.post(f"{url}{path}", json=body, headers=AUTH, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def talk(number: int) -> None:
        name, previous = f"person-{number}", None
        for turn in range(3):
            body = {"input": f"{name} asks {turn}", "previous_response_id": previous}
            answer = post("/v1/responses", body)
            (part,) = answer["output"][0]["content"]
            assert (
                part["text"] == f"{1 + 2 * turn} messages; the last ends with: {body['input']} [1]"
            )
            previous = answer["id"]
        alone = post("/score", {"input_data": f"{name} alone"})
        assert alone == {"answer": f"1 messages; the last ends with: {name} alone [1]"}

    with served(stub) as url, ThreadPoolExecutor(32) as people:
        list(people.map(talk, range(32)))
    for body in stub.bodies("a"):
        messages = messages_of(body)
        name = messages[-1]["content"].split()[0]
        assert all(name in message["content"].split() for message in messages)
