"""Steps that do not need each other, at the same time; shows one line for each that is at work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from ... import console
from ...progress import Progress, note
from .failures import scrub

log = logging.getLogger(__name__)

T = TypeVar("T")
_LOOKS = 0.2  # seconds between two looks at what is at work


def side_by_side(progress: Progress, works: Mapping[str, Callable[[Progress], T]]) -> dict[str, T]:
    """What each of the works returns, by its name; each reports on a line of its own.

    All of them end, also where one fails; then the first failure is raised. Ctrl-C ends the
    waiting, not what Azure has begun.
    """
    results: dict[str, T] = {}
    failures: list[BaseException] = []
    lines: dict[str, str] = {}

    def run(name: str, work: Callable[[Progress], T]) -> None:
        def show(done: int, total: int, text: str) -> None:
            lines[name] = f"{done}/{total} {text}" if total else text

        try:
            results[name] = work(show)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)
        finally:
            lines.pop(name, None)

    threads = [
        threading.Thread(target=run, args=item, name=item[0], daemon=True) for item in works.items()
    ]
    for thread in threads:
        thread.start()
    try:
        # Only this thread shows anything: a display need not stand several at once.
        while at_work := [thread for thread in threads if thread.is_alive()]:
            at_work[0].join(_LOOKS)
            if shown := "\n".join(list(lines.values())):
                note(progress, shown)
    except KeyboardInterrupt:
        console.note("Azure continues with what was begun, and what it creates may bill.")
        console.note("See what exists: phi3 status --on azure")
        raise
    if failures:
        raise failures[0]
    return results


@contextmanager
def meanwhile(progress: Progress, work: Callable[[Progress], object] | None) -> Iterator[Progress]:
    """Do `work` while the block is at something else; yields a progress that shows both.

    For what is only begun early: whoever needs it looks again and reports why it is not there.
    """
    line = ""

    def show_work(_done: int, _total: int, text: str) -> None:
        nonlocal line
        line = text

    def show_both(done: int, total: int, text: str) -> None:
        progress(done, total, f"{text}\n{line}" if line else text)

    def run() -> None:
        nonlocal line
        try:
            if work is not None:
                work(show_work)
        except Exception as error:  # noqa: BLE001 - whoever needs it meets the same again
            log.info("not ready yet: %s", scrub(str(error)))
        finally:
            line = ""

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield show_both
    while thread.is_alive():  # not after a failure or Ctrl-C, which do not come here
        thread.join(_LOOKS)
        if line:
            note(progress, line)
