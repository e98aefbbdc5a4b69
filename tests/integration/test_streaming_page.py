"""Prompt flow's chat page in a real browser: first words are there before the last are made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.chat_page import ask, chat_page
from tests.integration.pf_home import PfHome, pf_home
from tests.integration.streaming_endpoint import PIECES, Answering
from tests.integration.stub_endpoint import OPENAI, StubEndpoint

pytest_plugins = ("tests.integration.browser_plugin",)
pytest.importorskip("promptflow", reason="the extra `flow` is not installed")
pytestmark = pytest.mark.browser

KEY = "stream-page-key-4b"


@pytest.fixture(scope="module")
def answering() -> Answering:
    return Answering()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, answering: Answering) -> Iterator[PfHome]:
    with (
        StubEndpoint(script=answering) as stub,
        pf_home(tmp_path_factory.mktemp("streampage") / "home") as state,
    ):
        state.connect(stub.url(OPENAI), KEY)
        yield state


@pytest.fixture(scope="module")
def address(home: PfHome) -> Iterator[str]:
    with chat_page(home) as address:
        yield address


@pytest.mark.slow  # test_chat_web shows words as they come, on the same page
def test_words_appear_while_the_answer_is_made(
    page: Any,
    address: str,
    answering: Answering,
    tmp_path: Path,
) -> None:
    page.goto(address)
    ask(page, "Who began this company?")
    page.get_by_text(PIECES[0].strip()).first.wait_for(timeout=240_000)
    assert page.get_by_text(PIECES[-1]).count() == 0
    answering.seen_first.set()
    page.get_by_text("".join(PIECES)).first.wait_for(timeout=240_000)
    ask(page, "Do you fail in the middle?")
    page.get_by_text("the GPU is out of memory").first.wait_for(timeout=240_000)
    ask(page, "Is my key right?")
    page.get_by_text("status 401").first.wait_for(timeout=240_000)
    # What came before the break stays, with the reason below it.
    assert page.get_by_text("network error").count() == 0
    assert page.get_by_text("The answer was cut off.").first.is_visible()
    assert answering.given_up == 0
    picture = Path(os.environ.get("PHI3_SCREENSHOT_STREAMING", tmp_path / "streaming.png"))
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000
