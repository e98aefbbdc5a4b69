"""The `upstream` engine, put in front of another endpoint of ours and of servers that fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from tests.integration.server_fixture import KEY, PAIRS, Served, served

from phi3_training.serve.engines.base import Engine, EngineError, Sampling
from phi3_training.serve.engines.upstream import Upstream

pytest_plugins = ("tests.integration.server_plugin",)
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def behind(engine: Engine) -> Iterator[Served]:
    with served(engine) as endpoint:
        yield endpoint


@pytest.fixture
def in_front(behind: Served) -> Iterator[Served]:
    upstream = Upstream(behind.url + "/v1", "any", KEY)
    with served(upstream) as endpoint:
        yield endpoint


def test_answers_pass_through(in_front: Served, behind: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: in_front.score(pair[0], temperature=0), PAIRS[:8]))
    assert [answer.json() for answer in answers] == [{"output": a} for _, a in PAIRS[:8]]
    assert behind.wait_idle()


def test_a_stream_passes_through(in_front: Served) -> None:
    body = {
        "messages": [{"role": "user", "content": PAIRS[0][0]}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = in_front.post("/v1/chat/completions", body)
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(pieces) == PAIRS[0][1]
    assert len(events) > 5
    assert events[-1]["usage"]["prompt_tokens"] > 5


def ask(handler: Callable[[httpx.Request], httpx.Response]) -> str:
    async def main() -> str:
        engine = Upstream("http://up/v1", None, None, transport=httpx.MockTransport(handler))
        try:
            stream = engine.stream(MESSAGES, Sampling())
            return "".join([chunk.text async for chunk in stream])
        finally:
            await engine.close()
            assert engine.active == 0

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("status", "seen", "words"),
    [
        (400, 400, "refused: too long"),
        (401, 502, "PHI3_UPSTREAM_KEY"),
        (404, 502, "upstream_model"),
        (429, 503, "busy"),
        (500, 502, "failed"),
    ],
)
def test_refusals_are_distinguished(status: int, seen: int, words: str) -> None:
    body = {"error": {"message": "too long"}}
    with pytest.raises(EngineError, match=words) as caught:
        ask(lambda _request: httpx.Response(status, json=body))
    assert caught.value.status == seen


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "half-way"),
        ('data: {"error": {"message": "x"}}\n\n', "reported an error"),
        ("data: oops\n\n", "unreadable|no JSON"),
    ],
)
def test_broken_streams_are_errors(text: str, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        ask(lambda _request: httpx.Response(200, text=text))


def test_a_refusal_in_its_own_words_stays_out_of_headers() -> None:
    body = {"error": {"message": "bad prompt: my secret"}}
    transport = httpx.MockTransport(lambda _request: httpx.Response(400, json=body))
    with served(Upstream("http://up/v1", None, None, transport=transport)) as endpoint:
        answer = endpoint.score("my secret")
        assert answer.json() == {"output": "None"}
        assert "secret" not in answer.headers["x-phi3-reason"]
        chat = {"messages": [{"role": "user", "content": "my secret"}]}
        assert "my secret" in endpoint.post("/v1/chat/completions", chat).text


def test_a_server_that_is_not_there() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(EngineError, match="cannot be reached") as caught:
        ask(refuse)
    assert caught.value.status == 502


def test_what_is_asked_of_it() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        events = [
            {"choices": [{"delta": {"content": "hello"}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        ]
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, text=lines + "data: [DONE]\n\n")

    assert ask(answer) == "hello"
    assert str(seen[0].url) == "http://up/v1/chat/completions"
    assert json.loads(seen[0].content) == {
        "model": "default",
        "messages": MESSAGES,
        "max_tokens": 256,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def events(*texts: str, reason: str | None = "stop") -> str:
    choices = [{"delta": {"content": text}} for text in texts]
    if reason:
        choices.append({"delta": {}, "finish_reason": reason})
    return "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices)


@pytest.mark.parametrize(
    ("texts", "reason", "said"),
    [
        (("hello", "<|end|>"), "stop", "hello"),
        (("hel", "lo<|e", "nd|>"), "length", "hello"),
        (("hello<|end|>", "<|user|>", "And then?"), None, "hello"),
        (("a <|", "b"), "stop", "a <|b"),
        (("a <|en",), "stop", "a <|en"),
    ],
)
def test_a_turns_end_shown_as_text_ends_the_answer(
    texts: tuple[str, ...], reason: str | None, said: str
) -> None:
    assert ask(lambda _request: httpx.Response(200, text=events(*texts, reason=reason))) == said


def test_leaving_closes_the_other_connection() -> None:
    closed: list[bool] = []

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
                await asyncio.sleep(0)

        async def aclose(self) -> None:
            closed.append(True)

    async def main() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=Endless()))
        engine = Upstream("http://up/v1/chat/completions", None, None, transport=transport)
        stream = engine.stream(MESSAGES, Sampling())
        await anext(stream)
        await stream.aclose()
        assert engine.active == 0
        await engine.close()

    asyncio.run(main())
    assert closed == [True]
