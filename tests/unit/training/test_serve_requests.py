"""What the two APIs read: `/score` bodies and parameters, OpenAI's bodies."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from phi3_training.serve.engines.base import EngineError
from phi3_training.serve.openai_api import ChatRequest, unsupported
from phi3_training.serve.score_api import BadBodyError, read_score, score_sampling

USER = {"role": "user", "content": "hi"}


def test_messages_and_parameters_are_read() -> None:
    body = {"input_data": {"input_string": [USER], "parameters": {"top_p": 0.5}}, "params": {}}
    assert read_score(body) == ([USER], {"top_p": 0.5})


def test_of_several_conversations_the_first_is_read() -> None:
    other = {"role": "user", "content": "other"}
    assert read_score({"input_data": {"input_string": [[USER], [other]]}}) == ([USER], {})


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"input_data": []},
        {"input_data": {}},
        {"input_data": {"input_string": "hi"}},
        {"input_data": {"input_string": []}},
        {"input_data": {"input_string": [[]]}},
        {"input_data": {"input_string": ["hi"]}},
        {"input_data": {"input_string": [{"role": "user"}]}},
        {"input_data": {"input_string": [{"role": "user", "content": 3}]}},
        {"input_data": {"input_string": [{"role": "secret-text", "content": "x"}]}},
        {"input_data": {"input_string": [USER], "parameters": []}},
    ],
)
def test_a_bad_body_is_named_without_its_content(body: object) -> None:
    with pytest.raises(BadBodyError) as caught:
        read_score(body)
    assert "secret-text" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {"max_new_tokens": 256, "temperature": None}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_new_tokens": 6}, {"max_new_tokens": 6}),
        ({"max_new_tokens": 6, "max_gen_len": 7}, {"max_new_tokens": 7}),
        ({"do_sample": False, "temperature": 0.9}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.9}, {"temperature": 0.9}),
        ({"eos_token_id": 3}, {"stop_token_ids": (3,)}),
        ({"eos_token_id": [3, 4]}, {"stop_token_ids": (3, 4)}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 3, "return_full_text": False}, {"max_new_tokens": 256}),
    ],
)
def test_parameters_of_the_loi_image(parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = score_sampling(parameters, "loi", 256)
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_the_fms_image_knows_openai_names_only() -> None:
    given = {"max_new_tokens": 6, "do_sample": False, "temperature": 0.9, "eos_token_id": 3}
    sampling = score_sampling(given, "fms", 256)
    assert (sampling.max_new_tokens, sampling.temperature) == (256, 0.9)
    assert sampling.stop_token_ids == ()
    assert score_sampling({"max_tokens": 6}, "fms", 256).max_new_tokens == 6


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"stop": 3},
    ],
)
def test_impossible_parameters_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="bad parameters"):
        score_sampling(parameters, "loi", 256)


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [USER], **fields})


def test_openai_messages_become_plain_ones() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(
        messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    )
    assert asked.conversation() == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a\nb"},
    ]


def test_openai_fields_become_a_sampling() -> None:
    sampling = chat(temperature=0, max_tokens=9, stop="x", seed=1).sampling(256)
    assert (sampling.temperature, sampling.max_new_tokens) == (0, 9)
    assert (sampling.stop, sampling.seed) == (("x",), 1)
    assert chat().sampling(256).max_new_tokens == 256
    assert chat(max_completion_tokens=4).sampling(256).max_new_tokens == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"temperature": 1.5},
        {"top_p": -0.1},
        {"max_tokens": 0},
        {"n": 2},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ],
)
def test_openai_values_out_of_range_are_invalid(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        chat(**fields)


def test_what_the_endpoint_cannot_do_is_refused() -> None:
    assert "tools" in str(unsupported(chat(tools=[{}]), "drop"))
    assert "response_format" in str(unsupported(chat(response_format={"type": "json"}), "drop"))
    assert unsupported(chat(user="u", n=1, stream_options={}), "error") is None
    assert "logit_bias" in str(unsupported(chat(logit_bias={}), "error"))
    assert unsupported(chat(logit_bias={}), "drop") is None
