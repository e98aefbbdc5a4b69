"""Options that commands share, and the endpoint that they mean."""

from __future__ import annotations

import argparse

import pytest

from phi3_training.commands.endpoint import Endpoint
from phi3_training.commands.options import number
from phi3_training.targets import Access


@pytest.mark.parametrize("text", ["0", "51", "-1", "4.0", "four", "", "²"])
def test_what_is_no_number_of_passages(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1 to 50"):
        number(1, 50)(text)


def test_numbers_with_and_without_an_upper_limit() -> None:
    assert [number(1, 50)("1"), number(1, 50)("50"), number(0)("100000")] == [1, 50, 100000]


def test_our_own_endpoint_streams_on_its_second_route() -> None:
    local = Endpoint(Access("http://127.0.0.1:8080/score", "k"), dialect="score")
    streaming = local.streaming()
    assert streaming.access == Access("http://127.0.0.1:8080/v1/chat/completions", "k")
    assert streaming.dialect is None
    azure = Endpoint(Access("https://a.inference.ml.azure.com/score", "k"))
    assert azure.streaming() is azure


def test_a_batch_knows_an_endpoint_of_this_machine_whatever_its_port() -> None:
    first, second = (
        Endpoint(Access(f"http://127.0.0.1:{port}/score", "k")).name for port in (1, 2)
    )
    assert first == second == "http://127.0.0.1/score"
    assert Endpoint(Access("https://a.b:8443/score?x=1", "k")).name == "https://a.b:8443/score"


def test_a_client_that_knows_only_keys_gets_a_token_as_its_key() -> None:
    access = Access("https://a.b/score", None, lambda: "token")
    settings = Endpoint(access, "blue", context_length=900).settings()
    assert (settings.key, settings.deployment, settings.context_length) == ("token", "blue", 900)
    assert Endpoint(access).context == 4096
