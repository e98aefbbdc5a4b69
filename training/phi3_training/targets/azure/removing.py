"""Deleting on Azure: starts it, waits with progress and a limit, and looks whether it is gone.

A fault on the way is followed by another look; what is gone already is what was wanted.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ...console import ProgressCallback
from ...errors import StageError
from .failures import stage_error
from .waiting import CONFLICTS, TRIES, absent, follow, look, passing, state_of


def remove(
    doing: str,
    start: Callable[[], Any],
    read: Callable[[], Any],
    progress: ProgressCallback,
    *,
    limit: float,
    pause: float,
) -> bool:
    """Delete and wait until `read` finds nothing; False where nothing was there.

    Raises StageError when tries or time end; what is left then goes on billing.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    if look(read, doing) is None:
        return False
    ends = time.monotonic() + limit
    tries, conflicts = TRIES, CONFLICTS
    while tries:
        try:
            with no_dots():
                poller = start()
                if poller is not None and hasattr(poller, "done"):
                    follow(poller, doing, progress, max(1.0, ends - time.monotonic()))
        except (AzureError, MlException) as error:
            if getattr(error, "status_code", None) == 409 and conflicts:
                conflicts -= 1
                tries += 1
            if not absent(error) and not (tries > 1 and passing(error)):
                raise stage_error(error, doing) from None
        tries -= 1
        if _is_gone(doing, read, progress, ends, pause):
            return True
        progress(0, 0, f"{doing}: trying again")
        time.sleep(pause)
    raise StageError(
        f"{doing}: it is still there after {TRIES} tries and may still bill. Type the same command "
        "again in some minutes, or delete it in the studio"
    )


@contextmanager
def no_dots() -> Iterator[None]:
    """The SDK prints a dot on standard output at each poll, and an empty line at the end."""
    with redirect_stdout(io.StringIO()):
        yield


def _is_gone(
    doing: str, read: Callable[[], Any], progress: ProgressCallback, ends: float, pause: float
) -> bool:
    """Whether it is gone, waiting while it is being deleted."""
    while True:
        found = look(read, doing)
        if found is None:
            return True
        if state_of(found) != "deleting":
            return False
        if time.monotonic() > ends:
            raise StageError(
                f"{doing}: still being deleted when the time was up; see: phi3 status --on azure"
            )
        progress(0, 0, f"{doing}: being deleted")
        time.sleep(pause)
