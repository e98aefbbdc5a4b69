"""Where the key goes (to the endpoint alone) and where it must never show."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.stub_endpoint import (
    KEY,
    QUESTION,
    Reply,
    Seen,
    StubEndpoint,
    failure,
    no_listener,
)

from phi3_tool import ConfigurationError, Phi3Client, Phi3Error, ServiceError


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_never_takes_the_key_along(status: int) -> None:
    with StubEndpoint() as thief:
        reply = Reply(status, headers={"Location": thief.url()})
        with StubEndpoint(reply) as stub, Phi3Client(stub.url(), KEY) as client:
            error = failure(client)
        assert type(error) is ConfigurationError
        assert error.status == status
        assert thief.seen == []


def test_proxies_of_the_environment_do_not_see_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubEndpoint() as proxy, StubEndpoint() as stub:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with Phi3Client(stub.url(), KEY) as client:
            assert client.chat(QUESTION).text == "ok"
        assert proxy.connections == 0


def test_other_hosts_go_through_the_proxy_and_it_never_sees_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StubEndpoint(Reply(502)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        for name in ("NO_PROXY", "no_proxy", "https_proxy"):
            monkeypatch.delenv(name, raising=False)
        with Phi3Client("https://phi3.invalid/score", KEY, max_retries=0) as client:
            assert type(failure(client)) is ServiceError
        assert proxy.seen[0].path == "phi3.invalid:443"
        assert KEY not in repr(proxy.seen)


@pytest.mark.parametrize("key", [KEY, None])
def test_netrc_does_not_replace_the_key(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with StubEndpoint() as stub, Phi3Client(stub.url(), key) as client:
        client.chat(QUESTION)
        assert stub.seen[0].headers.get("authorization") == (key and f"Bearer {key}")


def test_cookies_are_refused() -> None:
    reply = Reply(headers={"Set-Cookie": "a=b; Path=/"})
    with StubEndpoint(reply) as stub, Phi3Client(stub.url(), KEY) as client:
        client.chat(QUESTION)
        client.chat(QUESTION)
        assert "cookie" not in stub.seen[1].headers


def test_a_refused_token_is_renewed_once() -> None:
    def script(seen: Seen) -> Reply:
        return Reply(200 if seen.headers["authorization"] == "Bearer t-2" else 401)

    tokens = iter(["t-1", "t-2", "t-3"])
    with (
        StubEndpoint(script=script) as stub,
        Phi3Client(stub.url(), token_provider=lambda: next(tokens)) as client,
    ):
        assert client.chat(QUESTION).attempts == 2
    tokens = iter(["t-1", "t-3", "t-4"])
    with (
        StubEndpoint(script=script) as stub,
        Phi3Client(stub.url(), token_provider=lambda: next(tokens)) as client,
    ):
        assert failure(client).attempts == 2
    with (
        StubEndpoint(script=script) as stub,
        Phi3Client(stub.url(), token_provider=lambda: "t-1") as client,
    ):
        assert failure(client).attempts == 1


def echo_everything(seen: Seen) -> Reply:
    """The worst server: it quotes the request's headers in everything it says."""
    told = json.dumps(dict(seen.headers))
    kind = json.loads(seen.body)["input_data"]["parameters"]["seed"]
    if kind == 0:
        return Reply(401, told.encode())
    if kind == 1:
        return Reply(424, told.encode(), {"ms-azureml-model-error-reason": told[:200]})
    if kind == 2:
        return Reply(body=json.dumps({"output": None, "error": seen.headers}).encode())
    if kind == 3:
        return Reply(body=b"{}", headers={"x-phi3-reason": told})
    if kind == 4:
        return Reply(body=json.dumps({seen.headers["authorization"]: 1}).encode())
    if kind == 5:
        return Reply(307, headers={"Location": f"https://{KEY}.example/?{KEY}"})
    if kind == 6:
        return Reply(500, b"x" * 290 + f" Bearer {KEY}".encode())
    return Reply(missing=9)


def everything_reachable(error: BaseException) -> Iterator[str]:
    """All that a log, a crash report or a debugger would show of an error."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        item = waiting.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        yield f"{item} {item!r} {item.args!r} {vars(item)!r}"
        yield "".join(
            traceback.TracebackException.from_exception(item, capture_locals=True).format()
        )
        waiting += [item.__cause__, item.__context__]


def test_a_planted_key_is_found_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not in repr, log, error, error chain or the local variables of a traceback."""
    caplog.set_level(logging.DEBUG)
    errors: list[Phi3Error] = []
    with StubEndpoint(script=echo_everything) as stub:
        client = Phi3Client(stub.url(), KEY, max_retries=1, backoff=0)
        errors += [failure(client, seed=kind) for kind in range(8)]
        with no_listener() as url, Phi3Client(url, KEY, max_retries=1, backoff=0) as lost:
            errors.append(failure(lost))
        shown = [repr(client), str(client), repr(vars(client)), caplog.text]
    assert len({type(error) for error in errors}) >= 5
    for error in errors:
        shown += everything_reachable(error)
        assert error.__context__ is None
    assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in stub.seen)
    for text in shown:
        assert KEY not in text
        assert KEY[:14] not in text


@pytest.mark.parametrize(
    "bad", [f"{KEY}\nX-Evil: 1", f"{KEY} x", f"Bearer {KEY}", KEY + "\x00", KEY + "é"]
)
def test_an_unusable_key_is_named_but_not_quoted(bad: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Phi3Client("https://example.com/score", bad)
    assert "key" in str(caught.value)
    assert "planted" not in str(caught.value)


def test_blanks_around_a_key_do_no_harm() -> None:
    with StubEndpoint() as stub, Phi3Client(stub.url(), f" {KEY}\n") as client:
        client.chat(QUESTION)
        assert stub.seen[0].headers["authorization"] == f"Bearer {KEY}"
