"""What Azure refuses is reported with code and fix; no secret passes."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.credentials import AccessToken
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError

from phi3_training.errors import StageError
from phi3_training.targets.azure.clients import InTenant, quiet_sdks, sign_in
from phi3_training.targets.azure.failures import explained, message_of, scrub, stage_error
from phi3_training.targets.azure.operations import create, get_or_none

from .azure_wire import Answer, Token, Wire, clients

ACCOUNT_KEY = base64.b64encode(b"k" * 64).decode()
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJodHRwcyJ9.c2lnbmF0dXJl"
SECRETS = [
    (
        f"https://st.blob.core.windows.net/c/b?sv=2022&se=2026&sr=b&sp=r&sig={ACCOUNT_KEY[:43]}%3D",
        ACCOUNT_KEY[:43],
    ),
    (f"AccountKey={ACCOUNT_KEY};EndpointSuffix=x", ACCOUNT_KEY),
    (f'{{"primaryKey": "{"q" * 32}"}}', "q" * 32),
    (f"key is {ACCOUNT_KEY} there", ACCOUNT_KEY),
    (f"Authorization: Bearer {'t0ken' * 8}", "t0ken" * 8),
    (f"access_token={'z' * 40}&x=1", "z" * 40),
    (f'"client_secret": "{"s" * 20}"', "s" * 20),
    (f"token {JWT} refused", JWT),
    ("https://me:hunter22@example.org/x", "hunter22"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_hidden_and_the_rest_stays(text: str, secret: str) -> None:
    shown = scrub(text)
    assert secret not in shown
    assert "[hidden]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "/subscriptions/0/resourceGroups/rg/providers/Microsoft.Storage/storageAccounts/st",
        "The quota of standardNCADSA100v4Family is 24, used 24",
        "see https://ml.azure.com/runs/x?wsid=/subscriptions/0&tid=1",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert scrub(text) == text


def _refusal(status: int, code: str, message: str, inner: str | None = None) -> HttpResponseError:
    from types import SimpleNamespace

    details = [SimpleNamespace(code=inner, message="inner")] if inner else []
    error = HttpResponseError(message)
    error.status_code = status
    error.error = SimpleNamespace(code=code, message=message, details=details)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_refusal(400, "BadRequest", "no cores", "OutOfQuota"), "phi3 azure quota --request"),
        (_refusal(403, "AuthorizationFailed", "no"), "User Access Administrator"),
        (_refusal(404, "SomethingElse", "no"), "phi3 azure provision"),
        (_refusal(409, "VaultAlreadyExists", "no"), "azure.key_vault"),
        (_refusal(500, "InternalServerError", "no"), "nothing is created twice"),
        (_refusal(200, "ResourceNotReady", "no"), "its log says why"),
        (_refusal(429, "X", "no"), "in a few minutes"),
    ],
)
def test_code_words_and_fix(error: HttpResponseError, said: str) -> None:
    text = str(stage_error(error, "Making it"))
    assert text.startswith("Making it failed")
    assert said in text
    assert "HTTP 200" not in text


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AuthorizationFailure", "network rules"),
        ("AuthorizationPermissionMismatch", "Storage Blob Data Contributor"),
        ("KeyBasedAuthenticationNotPermitted", "a policy switches"),
    ],
)
def test_a_refusal_of_the_storage_says_which_right_is_missing(code: str, said: str) -> None:
    # As azure-storage-blob words it.
    error = HttpResponseError(
        "This request is not authorized.\nRequestId:1-2\nTime:2026-11-29T09:00:00Z\n"
        f"ErrorCode:{code}\nContent: <?xml version='1.0'?><Error><Code>{code}</Code></Error>"
    )
    error.status_code = 403
    error.error_code = code
    text = str(stage_error(error, "Submitting"))
    assert text.startswith(f"Submitting failed ({code}, HTTP 403): This request is not authorized.")
    assert said in text
    assert "RequestId" not in text


def test_a_secret_in_azures_words_is_not_shown() -> None:
    error = _refusal(400, "BadRequest", f"cannot read ?sv=1&sig={'A' * 43}&se=2")
    with pytest.raises(StageError) as caught, explained("Reading"):
        raise error
    assert "A" * 43 not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_an_expired_sign_in_says_to_sign_in() -> None:
    assert "az login" in str(stage_error(ClientAuthenticationError("expired"), "Reading"))


def test_a_failed_sign_in_reports_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    with pytest.raises(StageError) as caught:
        sign_in(interactive=False)
    said = str(caught.value)
    assert "EnvironmentCredential" in said
    assert "browser: not tried" in said
    assert "az login" in said


def test_a_person_at_a_terminal_signs_in_with_the_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    token = Token()
    assert sign_in(interactive=True, browser=lambda **_options: token) is token


def test_every_token_is_of_the_recipes_tenant() -> None:
    asked: list[dict[str, Any]] = []

    class Credential:
        def get_token(self, *_scopes: str, **options: Any) -> AccessToken:
            asked.append(options)
            return AccessToken("x", 1)

    credential = InTenant(Credential(), "the-tenant")
    credential.get_token("scope", enable_cae=True)
    credential.get_token("scope", tenant_id="another")  # the service's challenge names it
    assert asked == [
        {"tenant_id": "the-tenant", "enable_cae": True},
        {"tenant_id": "another"},
    ]


@pytest.mark.parametrize("name", ["urllib3.connectionpool", "azure.test_scrubbed"])
@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_the_sdks_logs_at_debug_hold_no_secret(
    text: str, secret: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(name)
    quiet_sdks()
    with caplog.at_level(logging.DEBUG, logger=name):
        logger.debug('"%s %s" %s', "PUT", text, 201)
        try:
            int(text)
        except ValueError:
            logger.exception("failed")
    assert len(caplog.records) == 2
    assert secret not in caplog.text
    assert "ValueError" in caplog.text


def _group(method: str, url: str) -> Answer:
    del method, url
    return 200, {"name": "rg", "location": "eastus", "properties": {"provisioningState": "x"}}


def test_a_conflict_that_passes_is_tried_again_after_a_look(tmp_path: Path) -> None:
    calls: list[str] = []

    def answer(method: str, url: str) -> Answer:
        calls.append(method)
        if calls.count("PUT") == 1 and method == "PUT":
            return 409, {"error": {"code": "Conflict", "message": "busy"}}
        if method == "GET" and calls.count("PUT") < 2:
            return 404, {"error": {"code": "ResourceGroupNotFound", "message": "none"}}
        return 200, {"name": "rg", "location": "eastus", "properties": {}}

    groups = clients(Wire(answer), tmp_path).resources.resource_groups
    body = {"location": "eastus"}
    found = create(
        "Making rg",
        lambda: groups.create_or_update("rg", body),  # type: ignore[call-overload]
        lambda: groups.get("rg"),
        lambda _done, _total, _text: None,
        limit=30,
        pause=0.01,
    )
    assert found.name == "rg"
    assert calls == ["PUT", "GET", "PUT", "GET"]


def test_what_came_to_be_although_the_answer_was_lost_is_not_made_twice(tmp_path: Path) -> None:
    calls: list[str] = []

    def answer(method: str, _url: str) -> Answer:
        calls.append(method)
        if method == "PUT":
            return 500, {"error": {"code": "InternalServerError", "message": "lost"}}
        return 200, {"name": "rg", "location": "eastus", "properties": {}}

    groups = clients(Wire(answer), tmp_path).resources.resource_groups
    create(
        "Making rg",
        lambda: groups.create_or_update("rg", {"location": "x"}),  # type: ignore[call-overload]
        lambda: groups.get("rg"),
        lambda _done, _total, _text: None,
        limit=30,
        pause=0.01,
    )
    assert calls == ["PUT", "GET"]


def test_a_refusal_that_lasts_is_reported_at_once(tmp_path: Path) -> None:
    def answer(_method: str, _url: str) -> Answer:
        return 403, {"error": {"code": "AuthorizationFailed", "message": "no"}}

    wire = Wire(answer)
    groups = clients(wire, tmp_path).resources.resource_groups
    with pytest.raises(StageError, match="AuthorizationFailed"):
        get_or_none(lambda: groups.get("rg"), "Looking")
    assert len(wire.sent) == 1
    assert json.dumps(wire.sent).count("a-token") == 0


def test_ctrl_c_while_azure_makes_something_says_that_azure_continues(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Endless:
        def done(self) -> bool:
            return False

        def wait(self, _seconds: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(
            "Creating the deployment blue",
            Endless,
            lambda: None,
            lambda _done, _total, _text: None,
            limit=30,
            pause=0.01,
        )
    shown = capsys.readouterr().err
    assert "Creating the deployment blue: Azure continues" in shown
    assert "phi3 down --on azure" in shown


def test_the_sdks_colours_are_no_part_of_a_message() -> None:
    assert message_of(ValueError("\x1b[31m(x) The name is too long\x1b[39m")) == (
        "(x) The name is too long"
    )
