"""phi3_tool.client without a network: what is checked before anything is sent."""

from __future__ import annotations

import math

import pytest

from phi3_tool import ConfigurationError, Phi3Client, RequestRejectedError

URL = "https://phi3.eastus.inference.ml.azure.com/score"
QUESTION = [{"role": "user", "content": "Hi"}]


def test_every_fault_of_the_settings_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Phi3Client("https://example.com", "a\nb", deployment="a b", deadline=0, max_retries=-1)
    assert len(caught.value.faults) == 5
    for word in ("/score", "line break", "deployment", "deadline", "max_retries"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["connect_timeout", "read_timeout", "deadline"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, None, "5", True])
def test_times_are_checked(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Phi3Client(URL, "k", **{name: value})  # type: ignore[arg-type]
    assert name in str(caught.value)


def test_a_key_is_needed_unless_the_endpoint_is_local() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Phi3Client(URL)
    assert "key is missing" in str(caught.value)
    assert Phi3Client("http://localhost:8000/v1").dialect == "openai"


def test_repr_shows_where_and_no_secret() -> None:
    client = Phi3Client(f"{URL}?code=hidden", "planted-key", deployment="blue")
    assert repr(client) == f"Phi3Client({URL!r}, dialect='score', deployment='blue')"


def test_from_connection_takes_its_options_and_overrides() -> None:
    connection = {"endpoint": URL, "key": "k", "deployment": "blue"}
    assert "blue" in repr(Phi3Client.from_connection(connection))
    assert "green" in repr(Phi3Client.from_connection(connection, deployment="green"))


@pytest.mark.parametrize("value", [math.nan, object(), {1}])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with Phi3Client(URL, "k") as client, pytest.raises(RequestRejectedError):
        client.chat(QUESTION, seed=value)


@pytest.mark.parametrize("bad", ["", "x" * 101, "a b", "a\nb", "ü"])
def test_request_ids_are_checked(bad: str) -> None:
    with Phi3Client(URL, "k") as client, pytest.raises(RequestRejectedError):
        client.chat(QUESTION, request_id=bad)


def test_a_closed_client_says_so() -> None:
    with Phi3Client(URL, "k") as client:
        pass
    with pytest.raises(ConfigurationError):
        client.chat(QUESTION)
