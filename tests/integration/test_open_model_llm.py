"""promptflow-tools' `open_model_llm` tool, in its LLaMA chat dialect, talks to the endpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.integration.server_fixture import KEY, PAIRS, Served, served

from phi3_training.serve.engines.base import Engine

open_model_llm = pytest.importorskip("promptflow.tools.open_model_llm")
pytest_plugins = ("tests.integration.server_plugin",)


@pytest.fixture(scope="module")
def endpoint(engine: Engine) -> Iterator[Served]:
    with served(engine, deployment="blue") as endpoint:
        yield endpoint


def call(endpoint: Served, prompt: str, deployment: str = "") -> str:
    """What the tool does for a flow; the three last arguments stand for its connection."""
    answer = open_model_llm.OpenModelLLM().call(
        prompt=prompt,
        api=open_model_llm.API.CHAT,
        endpoint_name="localConnection/phi3",
        deployment_name=deployment,
        temperature=0.0,
        max_new_tokens=60,
        endpoint_url=endpoint.url + "/score",
        endpoint_api_key=KEY,
        model_family=open_model_llm.ModelFamily.LLAMA,
    )
    return str(answer)


@pytest.mark.parametrize("number", [0, 7, 33])
def test_a_chat_prompt_is_answered(endpoint: Served, number: int) -> None:
    question, answer = PAIRS[number]
    assert call(endpoint, f"user:\n{question}") == answer


def test_a_system_prompt_and_a_history_are_understood(endpoint: Served) -> None:
    (first, first_answer), (second, _) = PAIRS[0], PAIRS[1]
    prompt = f"system:\nBe brief.\nuser:\n{first}\nassistant:\n{first_answer}\nuser:\n{second}"
    assert call(endpoint, prompt)


def test_the_deployment_is_chosen_by_name(endpoint: Served) -> None:
    question, answer = PAIRS[2]
    assert call(endpoint, f"user:\n{question}", "blue") == answer
