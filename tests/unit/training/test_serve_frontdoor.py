"""The imitated front door and both APIs, in memory, around an engine that follows a script."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import pytest

from phi3_training.serve.config import ServerConfig
from phi3_training.serve.engines.base import (
    Chunk,
    EngineError,
    InvalidPromptError,
    Message,
    PromptTooLongError,
    Sampling,
    UnknownModelError,
)
from phi3_training.serve.server import create_app

KEY = "k3y-of-the-tests"
AUTH = {"Authorization": f"Bearer {KEY}"}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
SCORE = {"input_data": {"input_string": CHAT["messages"], "parameters": {}}}


class Scripted:
    """Says its pieces, or raises its error at the start (or after the pieces, if there are any)."""

    name = "scripted"
    context_length = 100

    def __init__(self, *pieces: str, error: EngineError | None = None, pause: float = 0) -> None:
        self.pieces, self.error, self.pause = pieces, error, pause
        self.active = 0
        self.asked: list[Sampling] = []

    async def stream(
        self, messages: Sequence[Message], sampling: Sampling
    ) -> AsyncGenerator[Chunk, None]:
        self.asked.append(sampling)
        self.active += 1
        try:
            for number, piece in enumerate(self.pieces, start=1):
                await asyncio.sleep(self.pause)
                yield Chunk(piece, None, 7, number)
            if self.error is not None:
                raise self.error
            yield Chunk("", "stop", 7, len(self.pieces))
        finally:
            self.active -= 1

    async def close(self) -> None:
        return None


def ask(
    engine: Scripted,
    *bodies: Any,
    path: str = "/score",
    headers: dict[str, str] | None = None,
    method: str = "POST",
    **settings: Any,
) -> list[httpx.Response]:
    """Send all bodies at once; their answers in order."""

    async def main() -> list[httpx.Response]:
        app = create_app(engine, ServerConfig(**settings), key=KEY)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://local") as client:
            calls = [
                client.request(
                    method,
                    path,
                    headers=AUTH if headers is None else headers,
                    content=body if isinstance(body, bytes) else json.dumps(body).encode(),
                )
                for body in bodies
            ]
            return await asyncio.gather(*calls)

    return asyncio.run(main())


def one(engine: Scripted, body: Any = SCORE, **more: Any) -> httpx.Response:
    return ask(engine, body, **more)[0]


def test_health_needs_no_key() -> None:
    answer = one(Scripted(), b"", path="/", method="GET", headers={})
    assert (answer.status_code, answer.text) == (200, "healthy")


def test_score_answers_output_alone() -> None:
    answer = one(Scripted("Bill ", "Gates"))
    assert answer.json() == {"output": "Bill Gates"}
    assert answer.headers["azureml-model-deployment"] == "local"
    assert int(answer.headers["ms-azureml-model-time"]) >= 0


def test_score_of_the_newer_image() -> None:
    answer = one(Scripted("Bill ", "Gates"), dialect="fms").json()
    assert answer["output"] == answer["message"]["content"] == "Bill Gates"
    assert answer["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": "Bearer s\xe9cret".encode("latin-1").decode("latin-1")},
    ],
)
@pytest.mark.parametrize("path", ["/score", "/v1/chat/completions", "/swagger.json", "/nowhere"])
def test_a_missing_or_wrong_key_is_401(headers: dict[str, str], path: str) -> None:
    engine = Scripted("x")
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = one(engine, path=path, headers=raw)  # type: ignore[arg-type]  # bytes: not all ASCII
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert engine.asked == []


def test_ids_are_echoed_and_made() -> None:
    sent = {**AUTH, "x-ms-client-request-id": "mine 1", "x-request-id": "r-1"}
    answer = one(Scripted("x"), headers=sent)
    assert answer.headers["x-ms-client-request-id"] == "mine 1"
    assert answer.headers["x-request-id"] == "r-1"
    answer = one(Scripted("x"))
    assert "x-ms-client-request-id" not in answer.headers
    assert len(answer.headers["x-request-id"]) == 36


@pytest.mark.parametrize("name", ["x-ms-client-request-id", "x-request-id"])
def test_a_long_id_is_431(name: str) -> None:
    assert one(Scripted("x"), headers={**AUTH, name: "i" * 100}).status_code == 200
    answer = one(Scripted("x"), headers={**AUTH, name: "i" * 101})
    assert answer.status_code == 431
    assert "i" * 101 not in str(answer.headers)


def test_an_unknown_deployment_is_404() -> None:
    known = one(
        Scripted("x"), headers={**AUTH, "azureml-model-deployment": "blue"}, deployment="blue"
    )
    assert known.status_code == 200
    answer = one(Scripted("x"), headers={**AUTH, "azureml-model-deployment": "green"})
    assert (answer.status_code, answer.text) == (404, "Specified traffic group could not be found")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "expected"),
        ([], "expected"),
        ({"input_data": {"input_string": "hi"}}, "input_string is not a list"),
        ({"input_data": {"input_string": [{"role": "x", "content": ""}]}}, "role of message 1"),
    ],
)
def test_a_bad_body_is_an_empty_200(body: Any, reason: str) -> None:
    answer = one(Scripted("x"), body)
    assert (answer.status_code, answer.json()) == (200, {})
    assert reason in answer.headers["x-phi3-reason"]


def test_a_body_that_is_no_json_fails_in_the_container() -> None:
    answer = one(Scripted("x"), b"{")
    assert answer.status_code == 424
    assert answer.headers["ms-azureml-model-error-statuscode"] == "500"
    assert answer.headers["ms-azureml-model-error-reason"] == "model_error"


@pytest.mark.parametrize(
    ("error", "output"),
    [
        (PromptTooLongError(200, 100), {"output": "None"}),
        (EngineError("broken"), {"output": "None"}),
        (InvalidPromptError("roles"), {}),
    ],
)
def test_an_engine_error_is_sent_inside_a_200(error: EngineError, output: Any) -> None:
    answer = one(Scripted(error=error))
    assert (answer.status_code, answer.json()) == (200, output)
    assert answer.headers["x-phi3-reason"].startswith(str(error)[:30])


def test_an_engine_error_of_the_newer_image() -> None:
    answer = one(Scripted(error=PromptTooLongError(200, 100)), dialect="fms")
    body = answer.json()
    assert answer.status_code == 200
    assert body["output"] is None
    assert body["error"]["status_code"] == 400


def test_a_bad_parameter_is_the_engines_answer() -> None:
    body = {"input_data": {**SCORE["input_data"], "parameters": {"temperature": "hot"}}}
    answer = one(Scripted("x"), body)
    assert answer.json() == {"output": "None"}
    assert "temperature" in answer.headers["x-phi3-reason"]
    assert "hot" not in answer.headers["x-phi3-reason"]


def test_a_body_over_the_limit_is_413() -> None:
    engine = Scripted("x")
    assert one(engine, b"x" * 2000, max_request_bytes=1024).status_code == 413
    assert engine.asked == []


def test_a_slow_answer_is_408_and_frees_its_place() -> None:
    engine = Scripted("never", pause=5)
    answer = one(engine, request_timeout_ms=100)
    assert (answer.status_code, answer.text) == (408, "upstream request timeout")
    assert engine.active == 0


def test_beyond_twice_the_concurrency_is_429() -> None:
    engine = Scripted("x", pause=0.2)
    answers = ask(engine, *[SCORE] * 7, max_concurrent_requests_per_instance=2)
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 3
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.content == b""
    assert refused.headers["ms-azureml-model-error-reason"] == "too_many_pending_request"


def test_chat_completion_in_openais_shape() -> None:
    answer = one(Scripted("Bill ", "Gates"), CHAT, path="/v1/chat/completions").json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Bill Gates"}
    assert answer["usage"]["total_tokens"] == 9


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_stream_of_events_ends_with_done() -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    answer = one(Scripted("Bill ", "Gates"), body, path="/chat/completions")
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, finish, figures, done = events(answer)
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == "Bill Gates"
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (figures["choices"], figures["usage"]["completion_tokens"]) == ([], 2)
    assert done == "[DONE]"


def test_an_error_before_the_first_piece_has_a_status() -> None:
    body = {**CHAT, "stream": True}
    engine = Scripted(error=PromptTooLongError(9, 8))
    answer = one(engine, body, path="/chat/completions")
    assert answer.status_code == 424
    assert answer.headers["ms-azureml-model-error-statuscode"] == "400"
    assert "9 tokens" in answer.json()["error"]["message"]
    answer = one(engine, body, path="/v1/chat/completions")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "9 tokens" in error["message"]


def test_an_error_in_mid_stream_is_an_event() -> None:
    engine = Scripted("Bill", error=EngineError("broken"))
    answer = one(engine, {**CHAT, "stream": True}, path="/v1/chat/completions")
    assert answer.status_code == 200
    assert events(answer)[-1]["error"]["message"] == "broken"


def test_a_stream_that_takes_too_long_ends_with_an_error_event() -> None:
    engine = Scripted(*["x"] * 50, pause=0.02)
    answer = one(
        engine, {**CHAT, "stream": True}, path="/v1/chat/completions", request_timeout_ms=200
    )
    assert events(answer)[-1]["error"]["code"] == "timeout"
    assert engine.active == 0


def test_invalid_openai_input_is_422_inside_424() -> None:
    answer = one(Scripted("x"), {**CHAT, "temperature": 3}, path="/chat/completions")
    assert answer.status_code == 424
    assert answer.headers["ms-azureml-model-error-statuscode"] == "422"
    error = answer.json()["error"]
    assert (error["code"], error["details"][0]["loc"]) == ("Invalid input", ["temperature"])


def test_extra_parameters_header_of_the_azure_route() -> None:
    body = {**CHAT, "logit_bias": {}}
    refused = one(Scripted("x"), body, path="/chat/completions")
    assert refused.headers["ms-azureml-model-error-statuscode"] == "400"
    headers = {**AUTH, "extra-parameters": "drop"}
    assert one(Scripted("x"), body, path="/chat/completions", headers=headers).status_code == 200
    assert one(Scripted("x"), body, path="/chat/completions", dialect="fms").status_code == 200


def openai_fault(answer: httpx.Response) -> dict[str, Any]:
    """The error of OpenAI's API: exactly its four fields, and nothing of Azure's."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not [name for name in answer.headers if name.startswith("ms-azureml-model-error")]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**CHAT, "temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({}, "messages"),
        (b"{", None),
        ({**CHAT, "tools": [{}]}, None),
    ],
)
def test_openais_400(body: Any, param: str | None) -> None:
    answer = one(Scripted("x"), body, path="/v1/chat/completions")
    error = openai_fault(answer)
    assert answer.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_openais_401_404_408_413_429() -> None:
    path = "/v1/chat/completions"
    keyless = one(Scripted("x"), CHAT, path=path, headers={})
    assert (keyless.status_code, openai_fault(keyless)["code"]) == (401, "invalid_api_key")
    other = {**AUTH, "azureml-model-deployment": "green"}
    assert openai_fault(one(Scripted("x"), CHAT, path=path, headers=other))["message"]
    late = one(Scripted("x", pause=5), CHAT, path=path, request_timeout_ms=100)
    assert (late.status_code, openai_fault(late)["code"]) == (408, "timeout")
    large = one(Scripted("x"), b"x" * 2000, path=path, max_request_bytes=1024)
    assert (large.status_code, openai_fault(large)["code"]) == (413, "request_too_large")
    crowd = ask(
        Scripted("x", pause=0.2), *[CHAT] * 7, path=path, max_concurrent_requests_per_instance=2
    )
    refused = [answer for answer in crowd if answer.status_code == 429]
    assert len(refused) == 3
    assert openai_fault(refused[0])["code"] == "rate_limit_exceeded"
    unknown = one(Scripted(error=UnknownModelError("no such model")), CHAT, path=path)
    assert unknown.status_code == 404
    assert openai_fault(unknown)["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_openais_api_has_and_we_do_not(path: str, method: str) -> None:
    answer = one(Scripted("x"), {"prompt": "hi"}, path=path, method=method)
    assert answer.status_code == 404
    assert "POST /v1/chat/completions" in openai_fault(answer)["message"]


def test_one_model_is_described() -> None:
    known = one(Scripted(), b"", path="/v1/models/phi3", method="GET")
    assert known.status_code == 200
    assert (known.json()["id"], known.json()["object"]) == ("phi3", "model")
    other = one(Scripted(), b"", path="/v1/models/gpt-4", method="GET")
    error = openai_fault(other)
    assert (other.status_code, error["code"]) == (404, "model_not_found")
    assert "phi3" in error["message"]


def preflight(origin: str) -> dict[str, str]:
    """What a browser asks before it sends a page's request, without the key."""
    return {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }


def test_pages_of_a_named_origin_may_ask() -> None:
    page = "http://localhost:3000"
    path, named = "/v1/chat/completions", (page,)
    asked = one(
        Scripted(), b"", path=path, method="OPTIONS", headers=preflight(page), cors_origins=named
    )
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == page
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    for headers, status in (({**AUTH, "Origin": page}, 200), ({"Origin": page}, 401)):
        answer = one(Scripted("x"), CHAT, path=path, headers=headers, cors_origins=named)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == page


def test_pages_of_other_origins_may_not() -> None:
    evil, named = "http://evil.example", ("http://localhost:3000",)
    asked = one(Scripted(), b"", method="OPTIONS", headers=preflight(evil), cors_origins=named)
    assert "access-control-allow-origin" not in asked.headers
    answer = one(Scripted("x"), headers={**AUTH, "Origin": evil}, cors_origins=named)
    assert "access-control-allow-origin" not in answer.headers
    with pytest.raises(ValueError, match="cors_origins"):
        ServerConfig(cors_origins=("localhost:3000",))


def test_an_unknown_path_is_the_containers_404() -> None:
    answer = one(Scripted("x"), path="/nowhere")
    assert answer.status_code == 424
    assert answer.headers["ms-azureml-model-error-statuscode"] == "404"


def test_no_cross_origin_answer() -> None:
    headers = {**AUTH, "Origin": "http://evil.example"}
    answer = one(Scripted("x"), headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_description_names_the_score_route() -> None:
    answer = one(Scripted(), b"", path="/swagger.json", method="GET").json()
    assert "/score" in answer["paths"]
    assert one(Scripted(), b"", path="/v1/models", method="GET").json()["data"][0]["id"] == "phi3"


def test_a_failure_of_ours_shows_and_logs_no_content(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Scripted):
        async def stream(
            self, messages: Sequence[Message], sampling: Sampling
        ) -> AsyncGenerator[Chunk, None]:
            raise RuntimeError(f"bug with {messages}")
            yield Chunk("")

    secret = {"messages": [{"role": "user", "content": "my secret"}]}
    with caplog.at_level(logging.DEBUG):
        answer = one(Broken(), secret, path="/v1/chat/completions")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text + caplog.text
    assert "RuntimeError at" in caplog.text


def test_the_log_line_has_no_key_and_no_unknown_path(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        one(Scripted("x"), path="/secret%0aline")
        one(Scripted("my answer"))
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("phi3_training")]
    assert len(ours) == 2
    assert "POST /score 200" in ours[1]
    assert not [word for word in (KEY, "secret", "my answer") if word in "".join(ours)]
