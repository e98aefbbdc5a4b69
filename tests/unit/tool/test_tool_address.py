"""phi3_tool.connection and wire.guess_dialect: which URLs are taken, and where a key may go."""

from __future__ import annotations

import pytest

from phi3_tool import ConfigurationError, guess_dialect
from phi3_tool.connection import in_dialect, is_loopback, parse_address, same_endpoint

AZURE = "https://phi3.eastus.inference.ml.azure.com"


@pytest.mark.parametrize(
    ("url", "dialect", "asked"),
    [
        (f"{AZURE}/score", "score", f"{AZURE}/score"),
        (f" {AZURE}/score/\n", "score", f"{AZURE}/score"),
        (f"{AZURE}/chat/completions", "openai", f"{AZURE}/chat/completions"),
        (f"{AZURE}/v1", "openai", f"{AZURE}/v1/chat/completions"),
        (f"{AZURE}/v1/chat/completions?v=1", "openai", f"{AZURE}/v1/chat/completions?v=1"),
        ("http://127.0.0.1:8000/score#x", "score", "http://127.0.0.1:8000/score"),
        ("HTTP://LOCALHOST/score", "score", "http://LOCALHOST/score"),
        ("http://[::1]:80/v1/", "openai", "http://[::1]:80/v1/chat/completions"),
    ],
)
def test_usable(url: str, dialect: str, asked: str) -> None:
    address = parse_address(url)
    assert (address.dialect, address.url) == (dialect, asked)
    assert "?" not in address.shown


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (None, "missing"),
        ("  ", "missing"),
        ("phi3.example.com/score", "full URL"),
        ("ftp://example.com/score", "full URL"),
        ("https:///score", "full URL"),
        (AZURE, "/score"),
        (f"{AZURE}/swagger.json", "/score"),
        ("https://ml.azure.com/endpoints/realtime/phi3/detail", "/score"),
        ("https://user:pass@example.com/score", "user name"),
        ("https://example.com:0/score", "host and port"),
        ("https://example.com:99999/score", "not a valid URL"),
        ("https://exa mple.com/score", "spaces"),
        ("https://exämple.com/score", "characters that"),
        ("https://example.com\\@evil.com/score", "characters that"),
        ("https://[::1/score", "not a valid URL"),
        ("https://example.com/score\nHost: x", "characters that"),
    ],
)
def test_unusable(url: object, word: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_address(url)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "host",
    ["example.com", "127.0.0.1.example.com", "127.1", "0x7f000001", "2130706433", "0.0.0.1",
     "localhost.example.com", "10.0.0.1", "[::]", "localhost."],
)  # fmt: skip
def test_plain_http_is_for_this_machine_alone(host: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_address(f"http://{host}/score")
    assert "https" in str(caught.value)


def test_loopback() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.8.9.10", "::1"]))
    assert not any(map(is_loopback, ["example.com", "128.0.0.1", "::2", ""]))


def test_a_dialect_may_be_set_where_a_proxy_renames_paths() -> None:
    assert parse_address(f"{AZURE}/my/phi3", "score").url == f"{AZURE}/my/phi3"
    assert parse_address(f"{AZURE}/v1", "openai").url == f"{AZURE}/v1/chat/completions"
    for url, dialect in (
        (f"{AZURE}/score", "openai"),
        (f"{AZURE}/v1/chat/completions", "score"),
        (AZURE, "score"),
        (f"{AZURE}/score", "grpc"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            parse_address(url, dialect)
        assert "dialect" in str(caught.value)


def test_the_same_endpoint_in_the_other_dialect() -> None:
    other = {f"{AZURE}/score?v=1": f"{AZURE}/v1/chat/completions?v=1"}
    other |= {f"{AZURE}/a/score": f"{AZURE}/a/v1/chat/completions"}
    for score, openai in other.items():
        assert in_dialect(score, "openai") == in_dialect(openai, "openai") == openai
        assert in_dialect(openai, "score") == in_dialect(score, "score") == score
        assert same_endpoint(score, openai)
    for shorter in (f"{AZURE}/v1", f"{AZURE}/chat/completions"):
        assert in_dialect(shorter, "score") == f"{AZURE}/score"
        assert in_dialect(shorter, "openai") == shorter, "it speaks that dialect already"
        assert same_endpoint(f"{AZURE}/score", shorter)
    assert in_dialect(f"{AZURE}/my/phi3", "openai") == f"{AZURE}/my/phi3"
    assert not same_endpoint(f"{AZURE}/score", "https://other.example/score")


def test_guess_names_what_it_found() -> None:
    with pytest.raises(ConfigurationError) as caught:
        guess_dialect("https://example.com/predict")
    assert "'/predict'" in str(caught.value)
