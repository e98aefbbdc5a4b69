"""Connections without a key: tokens of Microsoft Entra ID, given by azure-identity."""

from __future__ import annotations

import logging
import sys
import types

import pytest
from tests.integration.stub_endpoint import Reply, StubEndpoint

from phi3_tool import ConfigurationError, ConnectionSettings, Phi3Client
from phi3_tool.credentials import SCOPE, entra_tokens
from phi3_tool.deployments import choices

URL = "https://phi3.eastus.inference.ml.azure.com/score"


class Connection:
    """As Prompt flow's CustomConnection."""

    def __init__(self, configs: dict[str, str], secrets: dict[str, str]) -> None:
        self.configs = configs
        self.secrets = secrets


class RefusedError(Exception):
    """As azure-core's AzureError."""


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An azure-identity whose tokens are numbered; the scopes it was asked for."""
    asked: list[str] = []
    module = types.ModuleType("azure.identity")

    def provider(_credential: object, scope: str) -> object:
        def token() -> str:
            asked.append(scope)
            return f"token-{len(asked)}"

        return token

    module.DefaultAzureCredential = object  # type: ignore[attr-defined]
    module.get_bearer_token_provider = provider  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "azure.identity", module)
    core = types.ModuleType("azure.core.exceptions")
    core.AzureError = RefusedError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "azure.core.exceptions", core)
    return asked


@pytest.mark.parametrize(
    "connection",
    [
        Connection({"endpoint": URL}, {"auth": "entra"}),
        Connection({"endpoint": URL, "auth": "entra"}, {}),
        {"endpoint": URL, "auth": "entra"},
    ],
)
def test_no_key_is_missed(connection: object) -> None:
    settings = ConnectionSettings.from_connection(connection, {})
    assert (settings.endpoint, settings.key, settings.auth) == (URL, "", "entra")


def test_any_other_auth_still_wants_a_key() -> None:
    with pytest.raises(ConfigurationError, match="key is missing"):
        ConnectionSettings.from_connection({"endpoint": URL, "auth": "none"}, {})


def test_the_environment_may_say_so_too() -> None:
    settings = ConnectionSettings.from_environment({"PHI3_ENDPOINT": URL, "PHI3_AUTH": "entra"})
    assert (settings.key, settings.auth) == ("", "entra")
    keyed = {"PHI3_ENDPOINT": URL, "PHI3_AUTH": "entra", "PHI3_KEY": "k"}
    assert ConnectionSettings.from_environment(keyed).auth is None


def test_a_fresh_token_each_time(identity: list[str]) -> None:
    tokens = entra_tokens()
    assert [tokens(), tokens()] == ["token-1", "token-2"]
    assert identity == [SCOPE, SCOPE]


def test_a_client_of_such_a_connection_signs_in_late(identity: list[str]) -> None:
    with Phi3Client.from_connection({"endpoint": URL, "auth": "entra"}) as client:
        assert client.endpoint == URL
    assert identity == []


def test_a_sign_in_without_a_token_is_reported_in_one_line(
    identity: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_credential: object, _scope: str) -> object:
        def token() -> str:
            raise RefusedError("DefaultAzureCredential failed.\nAttempted: 12 lines")

        return token

    monkeypatch.setattr(sys.modules["azure.identity"], "get_bearer_token_provider", refuses)
    with pytest.raises(ConfigurationError, match=r"DefaultAzureCredential failed\. .*az login"):
        ConnectionSettings.from_connection({"endpoint": URL, "auth": "entra"}).credential().auth()


def test_the_list_of_deployments_signs_in_too(identity: list[str]) -> None:
    with StubEndpoint(Reply(body=b'{"data": [{"id": "blue"}]}'), Reply(401)) as stub:
        settings = ConnectionSettings.from_connection({"endpoint": stub.url(), "auth": "entra"})
        assert [choice.value for choice in choices(settings)] == ["", "blue"]
        (entry,) = choices(settings)
        sent = [request.headers["authorization"] for request in stub.seen]
    assert sent == ["Bearer token-1", "Bearer token-2"]
    assert "token of your sign-in (status 401)" in entry.shown
    assert identity == [SCOPE, SCOPE]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(ConfigurationError, match="pip install azure-identity"):
        Phi3Client.from_connection({"endpoint": URL, "auth": "entra"})


def test_the_library_prints_nothing_of_its_own(identity: list[str]) -> None:
    """A missing sign-in is a page of warnings, which Python prints where nobody handles them."""
    entra_tokens()
    handlers = logging.getLogger("azure.identity").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)
