"""phi3_tool.credentials: a secret is used, and shown nowhere."""

from __future__ import annotations

import pickle

import pytest
from requests import PreparedRequest

from phi3_tool import ConfigurationError
from phi3_tool.credentials import BearerAuth, Credential

KEY = "planted-key-5f1e9c"


def test_the_header() -> None:
    request = PreparedRequest()
    request.prepare(method="POST", url="https://example.com", auth=Credential(KEY, None).auth())
    assert request.headers["Authorization"] == f"Bearer {KEY}"


def test_nothing_shows_it() -> None:
    credential = Credential(KEY, None)
    auth = credential.auth()
    for thing in (credential, auth):
        assert KEY not in f"{thing!r} {thing!s}"
    assert KEY not in repr(vars(auth))
    with pytest.raises(TypeError):
        pickle.dumps(auth)


def test_quotes_are_scrubbed_before_they_are_cut() -> None:
    credential = Credential(KEY, None)
    for lead in range(270, 310):
        quoted = credential.quote("x" * lead + KEY)
        assert KEY[:6] not in quoted
        assert len(quoted) <= 300


def test_a_token_is_asked_for_each_time_and_the_latest_is_scrubbed() -> None:
    tokens = iter(["token-1", " token-2\n"])
    credential = Credential(None, lambda: next(tokens))
    first, second = credential.auth(), credential.auth()
    assert first != second
    assert second == BearerAuth("token-2")
    assert credential.scrub("it was token-2") == "it was [key hidden]"


@pytest.mark.parametrize("token", ["", None, 3, "a b", "a\nb"])
def test_an_unusable_token_is_named(token: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Credential(None, lambda: token).auth()  # type: ignore[arg-type,return-value]
    assert "token provider" in str(caught.value)


def test_no_credential_at_all() -> None:
    credential = Credential(None, None)
    assert not credential.is_set
    assert credential.scrub("text") == "text"
