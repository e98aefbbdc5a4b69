"""Runs a command inside a rehearsal and shows the calls that are answered meanwhile.

Reads calls.jsonl of the rehearsal's folder; writes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from .control import start
from .wire import Json

_STORAGE = (".blob.core.windows.net", ".file.core.windows.net")
_PREFIX = re.compile(r"/subscriptions/[^/]+/resourceGroups/[^/]+/providers/", re.IGNORECASE)
# They would lead the sign-in elsewhere.
_OTHER_SIGN_INS = {
    "AZURE_AUTHORITY_HOST",
    "AZURE_CLIENT_CERTIFICATE_PATH",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_TOKEN_CREDENTIALS",
    "IDENTITY_ENDPOINT",
    "MSI_ENDPOINT",
}
_SECONDS = 0.2
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def run_inside(command: Sequence[str], folder: Path) -> int:
    """Run `command` inside the rehearsal of `folder` (started if need be); its exit status.

    The calls that are answered meanwhile are shown on standard error.
    """
    rehearsal = start(folder)
    kept = {name: value for name, value in os.environ.items() if name not in _OTHER_SIGN_INS}
    environment = {**kept, **rehearsal.env}
    if os.environ.get("AZURE_SUBSCRIPTION_ID"):
        environment["AZURE_SUBSCRIPTION_ID"] = os.environ["AZURE_SUBSCRIPTION_ID"]
    ended = threading.Event()
    journal = rehearsal.folder / "calls.jsonl"
    shown_from = journal.stat().st_size if journal.is_file() else 0
    arguments = (journal, ended, sys.stderr, shown_from)
    follower = threading.Thread(target=follow, args=arguments, daemon=True)
    # Before the thread: the child takes a step between fork and exec.
    process = subprocess.Popen(  # noqa: S603 - the caller's own command, no shell
        command, env=environment, preexec_fn=ends_with_parent()
    )
    follower.start()
    try:
        return _wait(process)
    finally:
        ended.set()
        follower.join(5)


def ends_with_parent() -> Callable[[], None] | None:
    """What a process calls so that the kernel kills it when its parent dies (Linux).

    A killed `phi3 … --rehearse` must not leave its other half at work on the run.
    """
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    return ask


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status. Ctrl-C at a terminal reaches the child by itself; a signal does not."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                process.send_signal(signal.SIGINT)


def follow(path: Path, ended: threading.Event, out: TextIO, position: int = 0) -> None:
    """Show the journal's calls from `position` on until `ended`; a poll that repeats once."""
    seen: set[str] = set()
    count = 0
    while True:
        done = ended.wait(_SECONDS)
        lines, position = _new_lines(path, position)
        for line in lines:
            call = json.loads(line)
            count += 1
            text = in_short(call)
            if text not in seen:
                out.write(f"rehearsal: {text}\n")
            if call["method"] not in ("GET", "HEAD") and not call["host"].endswith(_STORAGE):
                seen.clear()  # something changed: what is asked now is news
            seen.add(text)
        if done:
            out.write(f"rehearsal: {count} calls answered\n")
        out.flush()
        if done:
            return


def _new_lines(path: Path, position: int) -> tuple[list[str], int]:
    """The whole lines behind `position`, and where they end."""
    if not path.is_file():
        return [], position
    with path.open("rb") as stream:
        stream.seek(position)
        content = stream.read()
    whole = content[: content.rfind(b"\n") + 1]
    return whole.decode().splitlines(), position + len(whole)


def describe(call: Json) -> str:
    """One call as people read it."""
    return f"{call['status']} {call['method']} {call['host']}{call['path']}"


def in_short(call: Json) -> str:
    """The call without what all have in common; of files that go up and down only where to."""
    if str(call["host"]).endswith(_STORAGE):
        return f"{call['method']} {call['host']}/…"
    return _PREFIX.sub("/…/", describe(call))
