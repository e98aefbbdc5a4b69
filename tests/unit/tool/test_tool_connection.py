"""phi3_tool.connection: settings out of whatever a user has, and every fault at once."""

from __future__ import annotations

import pytest

from phi3_tool import ConfigurationError, ConnectionSettings
from phi3_tool.connection import environment_names_endpoint

URL = "https://phi3.eastus.inference.ml.azure.com/score"
KEY = "planted-key-5f1e9c"


class PromptFlowLike:
    """As Prompt flow's CustomConnection: reading an attribute of it prints a warning."""

    def __init__(self, configs: dict[str, str], secrets: dict[str, str]) -> None:
        self.configs = configs
        self.secrets = secrets

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError(f"connection.{name} was read: Prompt flow would print a warning")


@pytest.mark.parametrize(
    "connection",
    [
        PromptFlowLike({"endpoint": URL}, {"key": KEY}),
        PromptFlowLike({"endpoint_url": URL, "model_family": "x"}, {"endpoint_api_key": KEY}),
        {"endpoint": URL, "key": KEY},
        {"endpoint_url": URL, "endpoint_api_key": f" {KEY}\n"},
        {"name": "c", "type": "custom", "configs": {"endpoint": URL}, "secrets": {"key": KEY}},
    ],
)
def test_shapes(connection: object) -> None:
    settings = ConnectionSettings.from_connection(connection, {})
    assert (settings.endpoint, settings.key) == (URL, KEY)
    assert (settings.deployment, settings.dialect, settings.context_length) == (None, None, None)
    assert ConnectionSettings.from_connection(settings) is settings


def test_options() -> None:
    configs = {
        "endpoint": "https://example.com/phi3",
        "deployment": "blue",
        "dialect": "openai",
        "context_length": "512",
    }
    settings = ConnectionSettings.from_connection(PromptFlowLike(configs, {"key": KEY}), {})
    assert (settings.deployment, settings.dialect) == ("blue", "openai")
    assert settings.context_length == 512


def test_the_key_is_not_in_the_repr() -> None:
    settings = ConnectionSettings.from_connection({"endpoint": URL, "key": KEY}, {})
    assert KEY not in repr(settings)
    assert URL in repr(settings)


@pytest.mark.parametrize(
    ("connection", "words"),
    [
        (PromptFlowLike({}, {}), ["endpoint is missing", "under configs", "key is missing"]),
        ({}, ["endpoint is missing", "endpoint or endpoint_url", "key is missing"]),
        (
            PromptFlowLike({"endpoint": "<endpoint>"}, {"key": "<key>"}),
            ["endpoint is not filled in", "key is not filled in", "phi3 connect"],
        ),
        ({"endpoint": "https://<name>.eastus.inference.ml.azure.com/score", "key": KEY},
         ["endpoint is not filled in"]),
        ({"endpoint": URL, "key": "***"}, ["key is not filled in"]),
        ({"endpoint": URL, "key": "your-key"}, ["key is not filled in"]),
        ({"endpoint": "${env:PHI3_ENDPOINT}", "key": "${env:PHI3_KEY}"},
         ["PHI3_ENDPOINT is not set", "PHI3_KEY is not set"]),
        ({"endpoint": "http://example.com/score", "key": "a b"}, ["plain http", "a space"]),
        ({"endpoint": URL, "key": KEY, "context_length": "many"}, ["context_length"]),
        ({"endpoint": URL, "key": ["x"]}, ["key must be text"]),
        ({"endpoint": URL, "endpoint_url": URL + "2", "key": KEY}, ["endpoint and endpoint_url"]),
        (PromptFlowLike({"endpoint": URL, "key": KEY}, {}), ["in clear", "secrets"]),
    ],
)  # fmt: skip
def test_every_fault_is_named_and_no_secret_quoted(connection: object, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ConnectionSettings.from_connection(connection, {})
    for word in words:
        assert word in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("nothing", [None, "", "phi3_connection"])
def test_a_name_is_not_a_connection(nothing: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ConnectionSettings.from_connection(nothing, {})
    assert "pf connection list" in str(caught.value)


def test_environment_placeholders_are_looked_up() -> None:
    connection = {"endpoint": "${env:MY_URL}", "key": "${env:MY_KEY}"}
    settings = ConnectionSettings.from_connection(connection, {"MY_URL": URL, "MY_KEY": KEY})
    assert (settings.endpoint, settings.key) == (URL, KEY)


def test_from_the_environment() -> None:
    environ = {"PHI3_ENDPOINT": f"{URL} ", "PHI3_KEY": f"{KEY}\n", "PHI3_DEPLOYMENT": "blue"}
    settings = ConnectionSettings.from_environment(environ)
    assert (settings.endpoint, settings.key, settings.deployment) == (URL, KEY, "blue")
    assert environment_names_endpoint(environ)
    assert not environment_names_endpoint({"PHI3_ENDPOINT": " ", "PHI3_KEY": KEY})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, ["PHI3_ENDPOINT is not set", "PHI3_KEY is not set", "phi3 env"]),
        ({"PHI3_ENDPOINT": URL}, ["PHI3_KEY is not set"]),
        ({"PHI3_ENDPOINT": "https://example.com", "PHI3_KEY": "a\nb"}, ["/score", "line break"]),
    ],
)
def test_environment_faults(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ConnectionSettings.from_environment(environ)
    for word in words:
        assert word in str(caught.value)
