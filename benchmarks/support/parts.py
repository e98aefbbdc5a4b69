"""Runs the parts of a long benchmark, each in a separate process that may fail or hang alone.

A part hands over its figures as JSON lines while it works; they are written to a file as they
come, so that nothing is lost with a part that fails later.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

_MARK = "figures "  # libraries print to a part's output too
_LEAST = 20.0  # seconds below which no part is begun


@dataclass(frozen=True)
class Part:
    """What one process does, and for how long at most (seconds)."""

    name: str
    limit: float


def hand_over(line: Line) -> None:
    """In a part: give a line to the process that started it."""
    print(_MARK + json.dumps(line), flush=True)


def run_parts(
    parts: Sequence[Part],
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    lines: Path,
    show: Callable[[Line], None],
    seconds: float,
) -> list[Line]:
    """`command --part NAME` for each part, within so many seconds in all; every line in order.

    A line of our own says what went wrong (`error`), or that there was no time left (`skipped`).
    """
    began, found = time.monotonic(), []
    lines.parent.mkdir(parents=True, exist_ok=True)
    with lines.open("w", encoding="utf-8") as stream:

        def keep(line: Line) -> None:
            found.append(line)
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            show(line)

        for part in parts:
            left = seconds - (time.monotonic() - began)
            if left < _LEAST:
                keep({"part": part.name, "skipped": f"the {seconds:.0f} seconds were up"})
                continue
            limit = min(part.limit, left)
            error = _run([*command, "--part", part.name], environment, limit, keep)
            if error:
                keep({"part": part.name, "error": error})
    return found


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
    keep: Callable[[Line], None],
) -> str | None:
    """One part; what went wrong, if anything did. At the limit it ends with all its children."""
    expired = threading.Event()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )

        def end() -> None:
            expired.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith(_MARK):
                    keep(json.loads(line.removeprefix(_MARK)))
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                end()
                process.wait()
        if expired.is_set():
            return f"ended at its limit of {limit:.0f} s"
        said.seek(0)
        last = said.read().strip().splitlines()[-1:] or ["it said nothing"]
        return f"exit {status}: {last[0][:300]}" if status else None
