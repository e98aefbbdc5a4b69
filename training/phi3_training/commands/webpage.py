"""`phi3 chat --web`: Prompt flow's chat page in the browser, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from phi3_tool.connection import ConnectionSettings

from .. import console
from ..errors import UsageError
from ..project import FLOW, find

DEFAULTS = {"system": "", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 256}
INPUTS = {"system": "system_prompt"}  # where the flow's input has another name


def add_web(parser: argparse.ArgumentParser) -> None:
    """--web and --no-browser."""
    parser.add_argument("--web", action="store_true", help="in Prompt flow's chat page instead")
    parser.add_argument(
        "--no-browser", action="store_true", help="with --web: only print the page's address"
    )


def run_web(args: argparse.Namespace, settings: ConnectionSettings, url: str) -> int:
    """Open the page and stay until Ctrl-C; `url` is where the endpoint streams."""
    from ..webchat import chat_page

    if args.question is not None:
        raise UsageError("Type the question into the page: phi3 chat --web takes none")
    streaming = (
        settings if url == settings.endpoint else replace(settings, endpoint=url, dialect=None)
    )
    changed = {
        INPUTS.get(name, name): getattr(args, name)
        for name, default in DEFAULTS.items()
        if getattr(args, name) != default
    }
    console.err.print("Opening Prompt flow's chat page; this takes a few seconds …")
    with _terminated_like_interrupted():
        try:
            with chat_page(find(FLOW), streaming, changed) as page:
                _announce(args, page.url)
                page.wait()
        except KeyboardInterrupt:
            console.err.print("Closed; nothing of the conversation was kept.")
    return 0


def _announce(args: argparse.Namespace, url: str) -> None:
    if args.output == "json":
        console.print_json({"url": url})
        sys.stdout.flush()
    else:
        console.out.print(f"Chat page: {url}", markup=False)
        console.err.print("Ctrl-C closes it.")
    if not args.no_browser and _has_screen():
        webbrowser.open(url)


def _has_screen() -> bool:
    """Whether there is a desktop for a browser; a text browser would take the terminal over."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """`kill` cleans up as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
