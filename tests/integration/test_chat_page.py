"""Prompt flow's chat page in a real browser: a question is typed and its answer seen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.chat_page import ask, chat_page
from tests.integration.pf_home import (
    Endpoint,
    PfHome,
    endpoint,
    pf_home,
)

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")
# `test_streaming_page` drives the same page, `test_chat_web` the one of `phi3 chat --web`.
pytestmark = [pytest.mark.browser, pytest.mark.slow]
pytest_plugins = ("tests.integration.browser_plugin",)

KEY = "page-test-key-7d"


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    with endpoint(KEY) as state:
        yield state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, served: Endpoint) -> Iterator[PfHome]:
    with pf_home(tmp_path_factory.mktemp("page") / "home") as state:
        state.connect(served.url, KEY)
        yield state


@pytest.fixture(scope="module")
def address(home: PfHome) -> Iterator[str]:
    with chat_page(home) as address:
        yield address


def test_question_typed_answer_seen(
    page: Any, address: str, served: Endpoint, tmp_path: Path
) -> None:
    page.goto(address)
    for question, seen in (
        ("Who founded Contoso?", "1: Who founded"),
        ("And when?", "3: And when?"),
    ):
        ask(page, question)
        page.get_by_text(seen).filter(visible=True).last.wait_for(timeout=240_000)
    assert [message["role"] for message in served.conversations[-1]] == [
        "user",
        "assistant",
        "user",
    ]
    picture = Path(os.environ.get("PHI3_SCREENSHOT", tmp_path / "chat_page.png"))
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000
    assert page.get_by_text("Failed to fetch").count() == 0
