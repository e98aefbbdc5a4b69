"""Prompt flow's own chat page on the chat flow, started as a user starts it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.pf_home import PF, PfHome, Process, free_port, interrupt

_TYPED = "box => box.value ?? box.innerText"


@contextmanager
def chat_page(home: PfHome) -> Iterator[str]:
    """The address that `pf` prints, once the page answers; it ends with the block."""
    log = home.path / "page.log"
    start: list[str | Path] = [PF, "service", "start", "--port", str(free_port())]
    show: list[str | Path] = [PF, "flow", "test", "--flow", home.copy_flow(), "--ui"]
    show += ["--skip-open-browser", "--port", str(free_port())]
    with log.open("wb") as stream:
        # To a file: the service detaches and would keep a pipe open for ever.
        assert home.start(start, log=stream).wait(120) == 0
        process = home.start(show, log=stream)
        try:
            yield _wait_for_address(process, log)
        finally:
            interrupt(process)


def _wait_for_address(process: Process, log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"http://127\.0\.0\.1:\d+/v1\.0/ui/chat\S+", text)
        if found and "Running on" in text:
            return found[0]
        assert process.poll() is None, text
        time.sleep(0.2)
    raise AssertionError(f"no chat page within 120 seconds:\n{text}")


def ask(page: Any, question: str) -> None:
    """Type a question and send it; again where the page was busy with the answer before."""
    box = page.get_by_role("textbox").first
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        if question not in box.evaluate(_TYPED):
            box.click()
            page.keyboard.type(question)
        page.get_by_title("Send", exact=True).click()
        for _ in range(20):
            page.wait_for_timeout(250)
            asked = page.get_by_text(question).filter(visible=True).count()
            if asked and question not in box.evaluate(_TYPED):
                return
    raise AssertionError(f"the page did not take {question!r}")
