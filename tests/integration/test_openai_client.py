"""The official `openai` package talks to the endpoint: whole answers, streams, errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

import openai
import pytest
from tests.integration.misbehaving import refused
from tests.integration.server_fixture import KEY, PAIRS, Served, served

from phi3_training.serve.engines.base import Chunk, Engine, Message, Sampling

pytest_plugins = ("tests.integration.server_plugin",)


@pytest.fixture(scope="module")
def endpoint(engine: Engine) -> Iterator[Served]:
    with served(engine, model_name="phi3-tuned") as endpoint:
        yield endpoint


@pytest.fixture
def client(endpoint: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def messages(number: int) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": PAIRS[number][0]}]


def test_a_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=messages(0))
    assert answer.choices[0].message.content == PAIRS[0][1]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "phi3-tuned"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="any", messages=messages(1), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == PAIRS[1][1]
    assert len([piece for piece in pieces if piece]) > 3, "it came in one block"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3


def test_a_stream_that_is_closed_early(client: openai.OpenAI, endpoint: Served) -> None:
    stream = client.chat.completions.create(
        model="any",
        messages=messages(2),
        stream=True,
        max_tokens=480,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert endpoint.wait_idle(3.0)


def test_the_model_list(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["phi3-tuned"]


def test_a_wrong_key(endpoint: Served) -> None:
    wrong = openai.OpenAI(base_url=endpoint.url + "/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        wrong.chat.completions.create(model="any", messages=messages(0))


def test_an_error_shows_what_to_fix(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="any", messages=messages(0), temperature=1.5)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    assert "temperature" in str(caught.value)


def test_one_model(client: openai.OpenAI) -> None:
    assert client.models.retrieve("phi3-tuned").id == "phi3-tuned"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_the_old_completions_say_what_to_use(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.completions.create(model="phi3-tuned", prompt="hi")


def test_turns_as_chat_clients_send_them(client: openai.OpenAI) -> None:
    """A greeting first, a late system message, two questions in a row."""
    answer = client.chat.completions.create(
        model="any",
        messages=[
            {"role": "assistant", "content": "Hello, how can I help?"},
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "user", "content": PAIRS[0][0]},
        ],
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_prompt_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context holds 512"):
        client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "lamp " * 600}], stream=True
        )


def test_a_stream_that_breaks_off_raises(behind_time: openai.OpenAI) -> None:
    stream = behind_time.chat.completions.create(
        model="any",
        messages=messages(0),
        stream=True,
        max_tokens=490,
        extra_body={"ignore_eos": True},
    )
    with pytest.raises(openai.APIError, match="upstream request timeout"):
        list(stream)


@pytest.fixture
def behind_time(engine: Engine) -> Iterator[openai.OpenAI]:
    """A client of an endpoint whose answers take longer than it allows."""
    with (
        served(Slowed(engine), request_timeout_ms=300) as endpoint,
        openai.OpenAI(base_url=endpoint.url + "/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


class Slowed:
    """An engine with a pause before each piece."""

    name, context_length = "slowed", 0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def active(self) -> int:
        return self._engine.active

    async def stream(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self._engine.stream(messages, sampling)) as stream:
            async for chunk in stream:
                await asyncio.sleep(0.05)
                yield chunk

    async def close(self) -> None:
        return None


def test_overload_is_retried_by_the_client(engine: Engine) -> None:
    overloaded = served(engine, outside=refused(429, [("retry-after", "0")], times=1))
    with overloaded as endpoint, openai.OpenAI(base_url=endpoint.url, api_key=KEY) as client:
        answer = client.chat.completions.create(model="any", messages=messages(3))
        assert answer.choices[0].message.content == PAIRS[3][1]
