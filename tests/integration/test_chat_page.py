"""Prompt flow's chat page in a real browser: a question is typed and its answer seen."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.pf_home import (
    PF,
    Endpoint,
    PfHome,
    endpoint,
    free_port,
    interrupt,
    pf_home,
)

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")
pytestmark = pytest.mark.browser
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
    """Start the page the way a user does; the address that `pf` prints, once it answers."""
    log = home.path / "page.log"
    command: list[str | Path] = [PF, "service", "start", "--port", str(free_port())]
    with log.open("wb") as stream:
        # To a file: the service detaches and would keep a pipe open for ever.
        subprocess.run(command, env=home.env, stdout=stream, stderr=stream, timeout=120, check=True)
        command = [PF, "flow", "test", "--flow", home.copy_flow(), "--ui", "--skip-open-browser"]
        command += ["--port", str(free_port())]
        process = subprocess.Popen(
            command, env=home.env, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
        try:
            yield wait_for_address(process, log)
        finally:
            interrupt(process)


def wait_for_address(process: subprocess.Popen[Any], log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"http://127\.0\.0\.1:\d+/v1\.0/ui/chat\S+", text)
        if found and "Running on" in text:
            return found[0]
        assert process.poll() is None, text
        time.sleep(0.2)
    raise AssertionError(f"no chat page within 120 seconds:\n{text}")


def test_question_typed_answer_seen(
    page: Any, address: str, served: Endpoint, tmp_path: Path
) -> None:
    page.goto(address)
    box = page.get_by_role("textbox").first
    for question, seen in (
        ("Who founded Contoso?", "1: Who founded"),
        ("And when?", "3: And when?"),
    ):
        box.click()
        page.keyboard.type(question)
        page.get_by_title("Send", exact=True).click()
        page.get_by_text(seen).first.wait_for(timeout=60_000)
    assert [message["role"] for message in served.conversations[-1]] == [
        "user",
        "assistant",
        "user",
    ]
    picture = Path(os.environ.get("PHI3_SCREENSHOT", tmp_path / "chat_page.png"))
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000
    assert page.get_by_text("Failed to fetch").count() == 0
