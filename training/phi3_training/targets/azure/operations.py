"""Calls that take minutes on Azure: with progress, a limit and retries, one by one or side by side.

After a transient fault (409 while something else changes, a lost poll, a reset connection) it looks
at what exists before it tries again, so that nothing is created twice. The SDKs' own retries of
single requests are set in clients.py.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar, runtime_checkable

from ... import console
from ...errors import StageError
from ...progress import Progress, captured_output, note
from .failures import code_of, explained, scrub, stage_error

log = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = Literal["exists", "created"]  # of making sure that something is there
TRIES = 4
# Tries after a 409 alone. There are more of them, because an endpoint or a cluster that is being
# changed refuses every other change for minutes: 60 tries are 5 minutes at the default pause of
# 5 s, and each of them first waits for the change that it can see.
CONFLICTS = 60
_GOOD = ("succeeded", "unknown", "")  # a resource group, for one, may have no state at all
_BAD = ("failed", "canceled", "cancelled")
# Codes of a 409 that waiting does not cure: a name is taken, a right or a registration is missing.
_LASTING_CONFLICTS = {
    "roleassignmentexists",
    "vaultalreadyexists",
    "storageaccountalreadytaken",
    "storageaccountalreadyexists",
    "alreadyinuse",
    "missingsubscriptionregistration",
    "scopelocked",
    "workspacesoftdeleted",
}


@runtime_checkable
class Poller(Protocol):
    """What this module needs of azure-core's LROPoller."""

    def done(self) -> bool:
        """Whether the operation has ended."""
        ...

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end; raises what went wrong."""
        ...


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import (
        ClientAuthenticationError,
        HttpResponseError,
        ServiceRequestError,
        ServiceResponseError,
    )

    if isinstance(error, ClientAuthenticationError):
        # A refused sign-in does not pass by waiting. A service's 401 may: a token that ran out on
        # its way, or a service that does not know it yet. A token of another tenant stays one.
        lasting = (code_of(error) or "").lower() == "invalidauthenticationtokentenant"
        return error.status_code == 401 and not lasting
    if isinstance(error, MlException):
        # azure-ai-ml reports a reset during an upload as "fields are invalid", and keeps the class
        # of the original error only in the text.
        return "azure.core.exceptions.Service" in str(error)
    if isinstance(error, (ServiceRequestError, ServiceResponseError)):
        return True
    if not isinstance(error, HttpResponseError):
        return False
    if (code_of(error) or "").lower() in _LASTING_CONFLICTS:
        return False
    status = error.status_code or 0
    # 409 and 412: something else changed the resource. azure-core repeats 408, 429 and
    # 5xx of GET and PUT by itself, and of a POST only 500, 503 and 504; here it has given up.
    return status in (408, 409, 412, 429) or status >= 500


def is_absent(error: BaseException) -> bool:
    """Whether Azure said that the resource, or what contains it, does not exist."""
    status = getattr(error, "status_code", None)
    if status == 404:
        return True
    return (code_of(error) or "").lower() in ("resourcenotfound", "resourcegroupnotfound")


def get_or_none(read: Callable[[], T], doing: str) -> T | None:
    """What `read` returns; None when it does not exist. StageError for every other refusal."""
    from azure.core.exceptions import HttpResponseError

    with explained(doing):
        try:
            return read()
        except HttpResponseError as error:
            if is_absent(error):
                return None
            raise


def find(what: str, name: str, read: Callable[[str], T]) -> T | None:
    """The resource `name`, by `read(name)`; None when it does not exist."""
    return get_or_none(lambda: read(name), f"Looking for the {what} {name}")


def state_of(resource: object) -> str:
    """The provisioning state, in lower case; '' if there is none."""
    state = getattr(resource, "provisioning_state", None)
    if state is None:  # a generic ARM resource has it among its properties
        properties = getattr(resource, "properties", None)
        if isinstance(properties, dict):
            state = properties.get("provisioningState")
    # A plain string in azure-ai-ml 1.32, an enumeration in 1.35.
    return str(getattr(state, "value", state) or "").lower()


def paced(waited: float, longest: float) -> float:
    """Seconds until the next look at what has taken `waited` seconds: at most `longest`.

    A twentieth of the wait, so that no end is seen later than by that much, and at least 1 s.
    """
    return min(longest, max(1.0, waited / 20))


def within(doing: str, call: Callable[[], T], progress: Progress, *, limit: float) -> T:
    """What `call` returns or raises; StageError after `limit` seconds. Keeps its prints off.

    For calls that upload, download or stream: the SDKs give those no limit, and Ctrl-C would wait
    for them.
    """
    # azure-ai-ml's storage clients wait in `while uploaded_file_count < total_file_count: sleep`
    # until every file has arrived, also where one never will (1.32 and 1.35, blob, Data Lake and
    # file share). A thread cannot be stopped: one that is given up waits on until the process ends.
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again where it was called
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    started = time.monotonic()
    with captured_output(io.StringIO(), of_new_threads=True):
        thread.start()
        while thread.is_alive():
            seconds = time.monotonic() - started
            thread.join(min(1.0, max(0.01, limit - seconds)))
            if not thread.is_alive():
                break
            note(progress, f"{doing}, {seconds:.0f} s")
            if seconds > limit:
                raise StageError(
                    f"{doing}: no answer after {limit:.0f} s. Check the network and whether the "
                    "workspace's storage account can be reached from here, or wait longer "
                    "(azure.poll.upload_timeout); then run the same command again"
                )
    if failures:
        raise failures[0]
    return results[0]


def wait_for(poller: Poller, text: str, progress: Progress, limit: float) -> None:
    """Wait for an operation: raises what it raises, StageError after `limit` seconds."""
    # azure-ai-ml's poller for workspaces says done() at once: its
    # `CustomArmTemplateDeploymentPollingMethod` holds the ARM deployment's own poller, and asks
    # that only in `result()`, without a limit (1.32 and 1.35).
    method = getattr(poller, "polling_method", None)
    inner = getattr(method(), "poller", None) if callable(method) else None
    poller = inner if isinstance(inner, Poller) else poller
    # `poller.result(timeout)` cannot be used: for an endpoint it raises an AttributeError while the
    # operation still runs (azure-ai-ml 1.32 and 1.35).
    started = time.monotonic()
    while not poller.done():
        poller.wait(1.0)  # only how often progress is shown; the poller asks Azure at its own pace
        seconds = time.monotonic() - started
        note(progress, f"{text}, {seconds:.0f} s")
        if seconds > limit and not poller.done():
            raise StageError(
                f"{text}: not done after {limit:.0f} s. Azure may still be working on it; check "
                f"with: phi3 status --on azure, and resume with the same command"
            )
    poller.wait()


def create(
    doing: str,
    start: Callable[[], object],
    read: Callable[[], T],
    progress: Progress,
    *,
    limit: float,
    pause: float,
) -> T:
    """Start an operation, wait for it, and return what `read` then finds.

    `limit` and `pause` are in seconds. Raises StageError when the tries or the time are used up.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError, HttpResponseError

    began = time.monotonic()
    ends = began + limit
    tries, conflicts = TRIES, CONFLICTS
    while True:
        try:
            operation = start()
            if isinstance(operation, Poller):
                with _noted_on_interrupt(doing):
                    wait_for(operation, doing, progress, max(1.0, ends - time.monotonic()))
            return wait_until_ready(doing, read, progress, ends=ends, pause=pause)
        except (AzureError, MlException) as error:
            # A poll that answers 404: the operation's record is lost, not the resource.
            lost_poll = isinstance(error, HttpResponseError) and error.status_code == 404
            if getattr(error, "status_code", None) == 409 and conflicts:
                conflicts -= 1
            else:
                tries -= 1
            if not tries or time.monotonic() > ends or not (is_transient(error) or lost_poll):
                raise stage_error(error, doing) from None
            log.info("%s: trying again after %s", doing, type(error).__name__)
        # The fault may have hit the answer alone: look whether the resource exists, or is being
        # made.
        with _noted_on_interrupt(doing):
            while (resource := get_or_none(read, doing)) is not None:
                state = state_of(resource)
                if state in _GOOD:
                    return resource
                if state in _BAD:
                    break
                if time.monotonic() > ends:
                    raise StageError(
                        f"{doing}: still {state} at the time limit; resume with the same command"
                    )
                note(progress, f"{doing}: {state}")
                time.sleep(paced(time.monotonic() - began, pause))
        note(progress, f"{doing}: trying again")
        time.sleep(pause)


def wait_until_ready(
    doing: str, read: Callable[[], T], progress: Progress, *, ends: float, pause: float
) -> T:
    """What `read` returns once its provisioning state is final, until the monotonic time `ends`.

    `read` may raise that nothing exists for a moment: a new workspace is found late. Raises
    StageError where the state is a failure, or not final in time.
    """
    began = time.monotonic()
    while True:
        resource = get_or_none(read, doing)
        state = state_of(resource) if resource is not None else "not found yet"
        if resource is not None and state in _GOOD:
            return resource
        if state in _BAD:
            raise StageError(f"{doing}: Azure left it in the state {state}")
        if time.monotonic() > ends:
            raise StageError(
                f"{doing}: still {state} at the time limit; resume with the same command"
            )
        note(progress, f"{doing}: {state}")
        time.sleep(paced(time.monotonic() - began, pause))


@contextmanager
def _noted_on_interrupt(doing: str) -> Iterator[None]:
    """Ctrl-C ends the waiting, not the operation: say so, because what it creates may bill."""
    try:
        yield
    except KeyboardInterrupt:
        console.note(f"{doing}: Azure continues, and what it creates may bill.")
        console.note("See what exists: phi3 status --on azure")
        console.note("Delete it:       phi3 down --on azure")
        raise


def delete(
    doing: str,
    start: Callable[[], object],
    read: Callable[[], object],
    progress: Progress,
    *,
    limit: float,
    pause: float,
) -> bool:
    """Delete and wait until `read` finds nothing; False where nothing existed.

    Raises StageError when the tries or the time are used up; what is left then still bills.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    if get_or_none(read, doing) is None:
        return False
    began = time.monotonic()
    ends = began + limit
    tries, conflicts = TRIES, CONFLICTS
    while tries:
        try:
            with without_dots():
                operation = start()
                if isinstance(operation, Poller):
                    wait_for(operation, doing, progress, max(1.0, ends - time.monotonic()))
        except (AzureError, MlException) as error:
            if getattr(error, "status_code", None) == 409 and conflicts:
                conflicts -= 1
                tries += 1
            if not is_absent(error) and not (tries > 1 and is_transient(error)):
                raise stage_error(error, doing) from None
        tries -= 1
        resource = get_or_none(read, doing)
        while resource is not None and state_of(resource) == "deleting":
            if time.monotonic() > ends:
                raise StageError(
                    f"{doing}: still being deleted at the time limit; check with: phi3 status "
                    f"--on azure"
                )
            note(progress, f"{doing}: deleting")
            time.sleep(paced(time.monotonic() - began, pause))
            resource = get_or_none(read, doing)
        if resource is None:
            return True
        note(progress, f"{doing}: trying again")
        time.sleep(pause)
    raise StageError(
        f"{doing}: it still exists after {TRIES} tries and may still bill. Run the same command "
        "again in a few minutes, or delete it in the studio"
    )


@contextmanager
def without_dots() -> Iterator[None]:
    """azure-ai-ml prints a dot at each poll, in a thread of its own, and a line at the end."""
    # Standard output alone: the log of a job that is followed meanwhile goes to standard error.
    with captured_output(io.StringIO(), of_new_threads=True, errors=False):
        yield


# --- several at the same time ---


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
