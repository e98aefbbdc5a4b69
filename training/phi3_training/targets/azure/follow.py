"""Follows a job to its end: its log lines, its progress, its true status.

The SDK streams the log; it ends quietly for cancelled jobs and says nothing of a limit, so the
status is asked for beside it. Writes <run>/azure/<purpose>.log (without secrets).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections import deque
from contextlib import redirect_stdout
from typing import IO, Any

from ... import console
from ...console import ProgressCallback
from ...errors import StageError
from ...run import Run
from .clients import Clients
from .failures import message_of, scrub
from .in_job import ERROR, PROGRESS
from .job_log import read_lines
from .waiting import absent, passing

log = logging.getLogger(__name__)

_BAD = {
    "failed": "failed",
    "canceled": "was cancelled",
    "cancelled": "was cancelled",
    "notresponding": "does not answer any more (its machine may be gone)",
    "paused": "was paused",
}
_SHOWN = 8  # last log lines in an error
_PATIENCE = 6  # times in a row that the status may not be told
_XML = re.compile(r"^\ufeff?<\?xml|^<Error>")
# What the SDK says around the log.
_AROUND = re.compile(r"(RunId: |Streaming \S+$|Execution Summary$|=+$)")


def status_of(job: Any) -> str:
    """The job's status in lower case; newer SDKs have an enumeration."""
    status = getattr(job, "status", None)
    return str(getattr(status, "value", status) or "").lower()


class Tap:
    """Takes what the SDK prints about a job, line by line; everything else goes through."""

    def __init__(self, through: Any, file: IO[str], progress: ProgressCallback) -> None:
        self._through = through
        self._file = file
        self._progress = progress
        self._thread: int | None = None
        self._rest = ""
        self._closed = False
        self._told_of: set[str] = set()
        self.ended = threading.Event()
        self.taken = 0
        self.refused = False
        self.shown: dict[str, Any] = {}
        self.last: deque[str] = deque(maxlen=_SHOWN)
        self.error: str | None = None
        self.said: tuple[int, int, str] = (0, 0, "")

    def take_over(self) -> None:
        """What this thread writes from now on is the job's."""
        self._thread = threading.get_ident()

    def close(self) -> None:
        """The next write of the job's thread ends it."""
        self._closed = True
        self.ended.set()

    def write(self, text: str) -> int:
        """As a stream's."""
        if threading.get_ident() != self._thread:
            return int(self._through.write(text))
        if self._closed:
            raise _LostInterestError
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line.rstrip())
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        if threading.get_ident() != self._thread:
            self._through.flush()
        elif self._closed:
            raise _LostInterestError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._through, name)

    def _line(self, line: str) -> None:
        if _XML.match(line):  # the storage's refusal, not the job's words
            raise _RefusedError
        if not line:
            return
        if _AROUND.match(line):
            self._file.write(line + "\n")
            return
        if line.startswith("Web View: "):  # at the beginning and at the end
            if line not in self._told_of:
                console.note(line)
            self._told_of.add(line)
            return
        self.taken += 1
        if line.startswith(PROGRESS):
            self._told(line.removeprefix(PROGRESS))
            return
        line = scrub(line)
        if line.startswith(ERROR):
            self.error = _text_of(line.removeprefix(ERROR))
            return
        self._file.write(line + "\n")
        self._file.flush()
        self.last.append(line)
        console.note(line)

    def _told(self, content: str) -> None:
        try:
            done, total, text = json.loads(content)
            self.said = (int(done), int(total), str(text))
        except (ValueError, TypeError):
            return
        self._progress(*self.said)


class _LostInterestError(Exception):
    """Nobody reads the job's log any more."""


class _RefusedError(Exception):
    """The SDK may not read the log, and takes the refusal for the log."""


def follow_job(
    clients: Clients,
    run: Run,
    purpose: str,
    name: str,
    progress: ProgressCallback,
    *,
    limit: float,
) -> Any:
    """The job when it is completed. StageError for every other end; Ctrl-C leaves it running."""
    with run.file("azure", f"{purpose}.log").open("w", encoding="utf-8") as file:
        tap = Tap(sys.stdout, file, progress)
        with redirect_stdout(tap):
            stream = threading.Thread(target=_stream, args=(clients, name, tap), daemon=True)
            stream.start()
            try:
                job = _until_done(clients, run, name, tap, progress, limit)
                tap.ended.set()
                stream.join(2 * clients.poll.job_interval + 10)  # the last lines
            except KeyboardInterrupt:
                _detached(run, name)
                raise
            finally:
                tap.close()
    status = status_of(job)
    if status == "completed":
        return job
    raise StageError(_ending(run, purpose, name, status, tap))


def _stream(clients: Clients, name: str, tap: Tap) -> None:
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    tap.take_over()
    for _ in range(3):
        try:
            clients.ml.jobs.stream(name)
        except _LostInterestError:
            return
        except MlException as error:  # how the SDK tells that the job failed
            tap.shown["error"] = _said_of(error)
            break
        except _RefusedError:
            tap.refused = True
            break
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            # It trips over answers that it does not expect: a signature where it wants a key.
            log.info("the SDK cannot read the log of %s: %s", name, type(error).__name__)
            tap.refused = True
            break
        except (AzureError, OSError) as error:
            log.info("the log of %s is not to be had: %s", name, scrub(str(error)))
            time.sleep(clients.poll.job_interval)
        else:
            break
    if tap.refused or not tap.taken:  # the SDK shows nothing of a job that has ended
        _stream_from_storage(clients, name, tap)


def _stream_from_storage(clients: Clients, name: str, tap: Tap) -> None:
    """The same without the SDK's help, until the job's end has been seen."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    seen = tap.taken
    while True:
        last = tap.ended.is_set()
        try:
            lines = [line for line in read_lines(clients, name) if line.strip()]
            tap.write("".join(f"{line}\n" for line in lines[seen:]))
            seen = max(seen, len(lines))
        except _LostInterestError:
            return
        except (AzureError, MlException, OSError, ValueError, AttributeError, TypeError) as error:
            log.info("the log of %s is not to be had: %s", name, scrub(str(error)))
        if last:
            return
        tap.ended.wait(clients.poll.job_interval)


def _until_done(
    clients: Clients, run: Run, name: str, tap: Tap, progress: ProgressCallback, limit: float
) -> Any:
    """Ask for the status until it is an end."""
    from azure.core.exceptions import AzureError

    started, faults = time.monotonic(), 0
    while True:
        try:
            job = clients.ml.jobs.get(name)
            faults = 0
        except AzureError as error:
            faults += 1
            # Also one that is not there: it was a moment ago, and comes again.
            if faults > _PATIENCE or not (passing(error) or absent(error)):
                raise StageError(
                    f"The job {name} works on, but Azure does not tell how far it is: "
                    f"{message_of(error)}. Go on with it: {_again(run)}"
                ) from None
            time.sleep(clients.poll.job_interval)
            continue
        status = status_of(job)
        if status == "completed" or status in _BAD:
            return job
        seconds = time.monotonic() - started
        done, total, text = tap.said
        progress(done, total, f"{status}, {seconds:.0f} s{': ' + text if text else ''}")
        if seconds > limit:
            raise StageError(
                f"The job {name} is still {status} after {limit:.0f} s and may bill. Wait on: "
                f"{_again(run)}; or end it: phi3 azure cancel --run {run.name}"
            )
        time.sleep(clients.poll.job_interval)


def _detached(run: Run, name: str) -> None:
    console.note(f"The job {name} works on in Azure, and bills while it does.")
    console.note(f"Come back to it: {_again(run)}")
    console.note(f"End it:          phi3 azure cancel --run {run.name}")


def _again(run: Run) -> str:
    return f"phi3 up --on azure --run {run.name}"


def _ending(run: Run, purpose: str, name: str, status: str, tap: Tap) -> str:
    """Why the job is no success, with its last words."""
    said = tap.error or tap.shown.get("error") or ""
    parts = [f"The job {name} {_BAD.get(status, f'ended as {status}')}."]
    if said:
        parts.append(str(said))
    if tap.last:
        parts.append("Its last lines:\n" + "\n".join(f"  {line}" for line in tap.last))
    parts.append(
        f"All of them: {run.path / 'azure' / (purpose + '.log')}\n"
        f"Mend what it names; then the same command starts a new job: {_again(run)}"
    )
    return "\n".join(parts)


def _said_of(error: BaseException) -> str:
    """Code and words of the job's error; the SDK hands them over as JSON in a text."""
    match = re.search(r"\{.*\}", str(error), re.DOTALL)
    try:
        found = json.loads(match[0])["error"] if match else {}
        code, words = found["code"], found["message"]
    except (ValueError, KeyError, TypeError):
        return message_of(error)
    return scrub(f"{code}: {words}")


def _text_of(content: str) -> str:
    try:
        return str(json.loads(content))
    except ValueError:
        return content.strip()
