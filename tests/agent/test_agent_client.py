"""Phi3ChatClient: what reaches the wire, what is refused, and how errors and streams end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("agent_framework", reason="Agent Framework is in .venv-agent: make agent")

from agent_framework import ChatResponse, Content, Message
from agent_framework.exceptions import (
    ChatClientException,
    ChatClientInvalidAuthException,
    ChatClientInvalidRequestException,
    ChatClientInvalidResponseException,
)
from tests.agent.recorded import KEY, run

from phi3_agent import FlowInputs, Phi3ChatClient, create_agent, create_workflow, run_flow
from phi3_agent.client import answer_text, phi3_error
from phi3_agent.workflow import stream_flow
from phi3_tool.wire import build_request
from phi3_training.agent.recorder import Reply

PARAMETERS = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 256}
Start = Callable[..., Any]


def sent(body: bytes) -> list[dict[str, str]]:
    messages = json.loads(body)["input_data"]["input_string"]
    assert isinstance(messages, list)
    return messages


def test_an_agent_sends_the_flows_bytes(endpoint: Start) -> None:
    stub = endpoint(a=[Reply(text=" white \n")])
    agent = create_agent(stub.client("a"), instructions=" Be brief. ")
    response = run(agent.run(" {{x}} <|end|> ü "))
    assert answer_text(response.messages) == " white \n"
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": " {{x}} <|end|> ü "},
    ]
    expected = json.dumps(build_request("score", messages, PARAMETERS)).encode()
    assert stub.bodies("a") == [expected]


def test_parts_of_a_message_are_joined_without_a_space(endpoint: Start) -> None:
    stub = endpoint()
    run(stub.client("a").get_response([Message("user", ["a", " b", "c"])]))
    assert sent(stub.bodies("a")[0]) == [{"role": "user", "content": "a bc"}]


def test_system_messages_and_instructions_become_one(endpoint: Start) -> None:
    stub = endpoint()
    agent = create_agent(stub.client("a"), instructions="One.")
    run(agent.run([Message("system", ["Two."]), Message("user", ["Hi"])]))
    assert sent(stub.bodies("a")[0])[0] == {"role": "system", "content": "One.\n\nTwo."}


def test_only_known_options_are_sent(endpoint: Start) -> None:
    stub = endpoint()
    options = {"seed": 3, "stop": ["x"], "user": "me", "metadata": {"a": "b"}, "do_sample": False}
    run(create_agent(stub.client("a")).run("Hi", options=options))
    parameters = json.loads(stub.bodies("a")[0])["input_data"]["parameters"]
    assert sorted(parameters) == sorted(
        ["temperature", "top_p", "max_new_tokens", "max_tokens", "stop", "seed", "do_sample"]
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tools": [lambda city: city]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
    ],
)
def test_what_no_endpoint_can_do_is_refused_by_name(
    endpoint: Start, options: dict[str, Any], named: str
) -> None:
    stub = endpoint()
    with pytest.raises(ChatClientInvalidRequestException, match=named):
        run(create_agent(stub.client("a")).run("Hi", options=options))
    assert stub.bodies("a") == []


def test_a_picture_is_refused(endpoint: Start) -> None:
    picture = Content.from_uri("https://example.com/a.png", media_type="image/png")
    stub = endpoint()
    with pytest.raises(ChatClientInvalidRequestException, match="text only"):
        run(stub.client("a").get_response([Message("user", ["See:", picture])]))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(401), ChatClientInvalidAuthException),
        (Reply(400), ChatClientInvalidRequestException),
        (Reply(404), ChatClientInvalidRequestException),
        (Reply(body=b"{}"), ChatClientInvalidResponseException),
        (Reply(429, headers={"retry-after-ms": "0"}), ChatClientException),
        (Reply(501), ChatClientException),
    ],
)
def test_errors_are_the_frameworks_and_keep_ours(
    endpoint: Start, reply: Reply, expected: type[Exception], stream: bool
) -> None:
    async def ask(client: Phi3ChatClient) -> None:
        if stream:
            async for _ in client.get_response([Message("user", ["Hi"])], stream=True):
                pass
        else:
            await client.get_response([Message("user", ["Hi"])])

    stub = endpoint(a=[reply])
    with pytest.raises(ChatClientException) as caught:
        run(ask(stub.client("a", "openai" if stream else "score")))
    assert type(caught.value) is expected
    ours = phi3_error(caught.value)
    assert ours is not None
    assert ours.status == reply.status
    assert str(caught.value) == str(ours)
    assert KEY not in repr(caught.value)


def test_a_missing_endpoint_is_reported_at_once() -> None:
    with pytest.raises(ChatClientInvalidRequestException, match="connection"):
        Phi3ChatClient()


def test_a_stream_comes_piece_by_piece_and_ends_whole(endpoint: Start) -> None:
    stub = endpoint(a=[Reply(pieces=[" a", "b ", "\n"])])

    async def ask() -> tuple[list[str], ChatResponse[Any]]:
        stream = stub.client("a", "openai").get_response([Message("user", ["Hi"])], stream=True)
        pieces = [update.text async for update in stream if update.text]
        return pieces, await stream.get_final_response()

    pieces, response = run(ask())
    assert pieces == [" a", "b ", "\n"]
    assert answer_text(response.messages) == " ab \n"
    assert response.finish_reason == "stop"


def test_a_stream_that_breaks_raises_in_the_client_and_ends_with_a_note_in_the_flow(
    endpoint: Start,
) -> None:
    broken = [Reply(pieces=["one ", "two"], cut=1)]
    stub = endpoint(a=broken, b=broken)
    got: list[str] = []

    async def ask() -> None:
        question = [Message("user", ["Hi"])]
        async for update in stub.client("a", "openai").get_response(question, stream=True):
            got.append(update.text)

    with pytest.raises(ChatClientInvalidResponseException, match="cut off"):
        run(ask())
    assert got == ["one "]

    async def flow() -> str:
        workflow = create_workflow(stub.client("b", "openai"))
        return "".join([piece async for piece in stream_flow(workflow, FlowInputs("Hi"))])

    assert run(flow()).startswith("one \n\n[The answer was cut off. ")


def test_history_beyond_the_context_is_left_out_in_whole_turns(endpoint: Start) -> None:
    stub = endpoint()
    history = [
        {"inputs": {"input_data": f"question {i} " * 9}, "outputs": {"answer": f"answer {i} " * 9}}
        for i in range(50)
    ]
    # By the framework's own road, and by the workflow's: the same cut.
    client = stub.client("a", context_length=600)
    messages = [
        Message(role, [text])
        for turn in history
        for role, text in (
            ("user", turn["inputs"]["input_data"]),
            ("assistant", turn["outputs"]["answer"]),
        )
    ]
    run(create_agent(client).run([*messages, Message("user", ["And now?"])]))
    run(run_flow(create_workflow(client), FlowInputs("And now?", history)))
    by_agent, by_workflow = stub.bodies("a")
    assert by_agent == by_workflow
    kept = sent(by_agent)
    assert 1 < len(kept) < 100
    assert [message["role"] for message in kept[:2]] == ["user", "assistant"]
