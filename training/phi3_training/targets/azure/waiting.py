"""Waiting for Azure: progress while an operation runs, a limit, and bounded tries after faults.

A fault that passes (409 while something else changes, a lost poll, a reset) is followed by a look
at what is there, so that nothing is made twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ... import console
from ...console import ProgressCallback
from ...errors import StageError
from .failures import code_of, explained, stage_error

log = logging.getLogger(__name__)

Found = TypeVar("Found")
TRIES = 4
CONFLICTS = 30  # more: what is being changed or made refuses other changes for minutes
_GOOD = ("succeeded", "unknown", "")  # some resources have no state at all
_BAD = ("failed", "canceled", "cancelled")
# Conflicts that do not pass by themselves.
_LASTING = {
    "roleassignmentexists",
    "vaultalreadyexists",
    "storageaccountalreadytaken",
    "storageaccountalreadyexists",
    "alreadyinuse",
    "missingsubscriptionregistration",
    "scopelocked",
    "workspacesoftdeleted",
}


def passing(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import (
        ClientAuthenticationError,
        HttpResponseError,
        ServiceRequestError,
        ServiceResponseError,
    )

    if isinstance(error, ClientAuthenticationError):
        return False
    if isinstance(error, MlException):
        # A reset during an upload comes out as "fields are invalid", with its class in the text.
        return "azure.core.exceptions.Service" in str(error)
    if isinstance(error, (ServiceRequestError, ServiceResponseError)):
        return True
    if not isinstance(error, HttpResponseError):
        return False
    if (code_of(error) or "").lower() in _LASTING:
        return False
    status = error.status_code or 0
    return status in (408, 409, 412, 429) or status >= 500


def absent(error: BaseException) -> bool:
    """Whether Azure said that the thing, or what it stands in, is not there."""
    status = getattr(error, "status_code", None)
    if status == 404:
        return True
    return (code_of(error) or "").lower() in ("resourcenotfound", "resourcegroupnotfound")


def look(read: Callable[[], Found], doing: str) -> Found | None:
    """What `read` finds; None when it is not there."""
    from azure.core.exceptions import HttpResponseError

    with explained(doing):
        try:
            return read()
        except HttpResponseError as error:
            if absent(error):
                return None
            raise


def state_of(found: Any) -> str:
    """The provisioning state, in lower case; '' where there is none."""
    state = getattr(found, "provisioning_state", None)
    if state is None:
        properties = getattr(found, "properties", None)
        if isinstance(properties, dict):
            state = properties.get("provisioningState")
    return str(getattr(state, "value", state) or "").lower()


def follow(poller: Any, text: str, progress: ProgressCallback, limit: float) -> None:
    """Wait for a long-running operation; what it raises is raised, StageError past the limit."""
    started = time.monotonic()
    while not poller.done():
        poller.wait(1.0)
        seconds = time.monotonic() - started
        progress(0, 0, f"{text}, {seconds:.0f} s")
        if seconds > limit and not poller.done():
            raise StageError(
                f"{text}: not done after {limit:.0f} s. It may still go on in Azure; "
                "look with: phi3 status --on azure, and go on with the same command"
            )
    poller.wait()  # raises what went wrong


def make(
    doing: str,
    start: Callable[[], Any],
    read: Callable[[], Found],
    progress: ProgressCallback,
    *,
    limit: float,
    pause: float,
) -> Found:
    """Start an operation, follow it, and return what `read` then finds.

    After a fault that passes it first looks whether the thing is there or is being made.
    Raises StageError when tries, time or Azure's patience end.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError, HttpResponseError

    ends = time.monotonic() + limit
    tries, conflicts = TRIES, CONFLICTS
    while True:
        try:
            poller = start()
            if poller is not None and hasattr(poller, "done"):
                with _told_when_left(doing):
                    follow(poller, doing, progress, max(1.0, ends - time.monotonic()))
            return read()
        except (AzureError, MlException) as error:
            lost_poll = isinstance(error, HttpResponseError) and error.status_code == 404
            if getattr(error, "status_code", None) == 409 and conflicts:
                conflicts -= 1
            else:
                tries -= 1
            if not tries or time.monotonic() > ends or not (passing(error) or lost_poll):
                raise stage_error(error, doing) from None
            log.info("%s: trying again after %s", doing, type(error).__name__)
        with _told_when_left(doing):
            found = _being_made(doing, read, progress, ends, pause)
        if found is not None:
            return found
        progress(0, 0, f"{doing}: trying again")
        time.sleep(pause)


@contextmanager
def _told_when_left(doing: str) -> Iterator[None]:
    """Ctrl-C ends the waiting, not the making: say so, because what is made may bill."""
    try:
        yield
    except KeyboardInterrupt:
        console.note(f"{doing}: Azure goes on with it, and what it makes may bill.")
        console.note("See what is there: phi3 status --on azure")
        console.note("Take it down:      phi3 down --on azure")
        raise


def _being_made(
    doing: str,
    read: Callable[[], Found],
    progress: ProgressCallback,
    ends: float,
    pause: float,
) -> Found | None:
    """What is there and good, waiting while it is being made; None when it must be made."""
    while True:
        found = look(read, doing)
        if found is None or state_of(found) in _BAD:
            return None
        if state_of(found) in _GOOD:
            return found
        if time.monotonic() > ends:
            raise StageError(
                f"{doing}: still {state_of(found)} when the time was up; "
                "go on with the same command"
            )
        progress(0, 0, f"{doing}: {state_of(found)}")
        time.sleep(pause)
