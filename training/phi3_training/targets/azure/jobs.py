"""Jobs: named before they are submitted, submitted once, gone on with after any interruption.

Reads and writes <run>/azure/jobs.json (which job does what for this run).
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ...console import ProgressCallback
from ...errors import StageError
from ...run import Run, write_atomically
from .clients import Clients, quiet_uploads
from .failures import explained, stage_error
from .follow import follow_job, status_of
from .waiting import TRIES, look, passing

log = logging.getLogger(__name__)

TRAIN, EVALUATE = "train", "evaluate"
WORKING = frozenset(
    ("notstarted", "queued", "preparing", "provisioning", "starting", "running", "finalizing")
)
_STAGES = {TRAIN: "model", EVALUATE: "metrics"}  # whose manifest names the job that was used


@dataclass(frozen=True)
class Ticket:
    """A job of this run: its name in Azure and the inputs that it was made for."""

    name: str
    fingerprint: str
    route: str
    attempt: int


def tickets(run: Run) -> dict[str, Ticket]:
    """The run's jobs by what they are for."""
    path = run.path / "azure" / "jobs.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {purpose: Ticket(**item) for purpose, item in content.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise StageError(
            f"{path} is not what phi3 wrote. A job may still work: look in the studio, cancel it "
            "there, and delete the file"
        ) from None


def carry_out(
    clients: Clients,
    run: Run,
    purpose: str,
    fingerprint: str,
    route: str,
    build: Callable[[str], Any],
    progress: ProgressCallback,
    *,
    limit: float,
) -> Any:
    """The completed job for these inputs: the one that works or is done, else a new one.

    Raises StageError when it fails, is cancelled, or when another job of the run is still at work.
    """
    ticket, job = _known(clients, run, purpose, fingerprint)
    if ticket is None:
        ticket = _new_ticket(run, purpose, fingerprint, route)
    if job is None:
        progress(0, 0, f"submitting the job {ticket.name}")
        job = _submit(clients, ticket, build)
    else:
        progress(0, 0, f"going on with the job {ticket.name}")
    if status_of(job) != "completed":
        job = follow_job(clients, run, purpose, ticket.name, progress, limit=limit)
    return job


def _known(
    clients: Clients, run: Run, purpose: str, fingerprint: str
) -> tuple[Ticket | None, Any | None]:
    """The ticket to go on with and its job; (ticket, None) was never submitted."""
    ticket = tickets(run).get(purpose)
    if ticket is None:
        return None, None
    job = look(lambda: clients.ml.jobs.get(ticket.name), f"Reading the job {ticket.name}")
    same = ticket.fingerprint == fingerprint
    if job is None:  # killed between the name and the call: the name is still good
        return (ticket, None) if same else (None, None)
    status = status_of(job)
    if status in WORKING or status == "cancelrequested":
        if not same:
            raise StageError(
                f"The job {ticket.name} of this run still works ({status}), for other settings or "
                f"chats. Wait for it with the settings it has, or end it: "
                f"phi3 azure cancel --run {run.name}"
            )
        return ticket, job
    if status == "completed" and same and not _used(run, purpose, ticket):
        return ticket, job
    return None, None


def _used(run: Run, purpose: str, ticket: Ticket) -> bool:
    """Whether the stage was done with this job: then doing it again means a new job."""
    manifest = run.manifest(_STAGES[purpose]) or {}
    return bool(manifest.get("job") == ticket.name)


def _new_ticket(run: Run, purpose: str, fingerprint: str, route: str) -> Ticket:
    """Draw a name and write it down, before Azure hears of it."""
    known = tickets(run)
    before = known.get(purpose)
    attempt = 1 if before is None else before.attempt + 1
    plain = "".join(c if c.isalnum() else "-" for c in run.name.lower())[:40].strip("-")
    name = f"phi3-{purpose}-{plain}-{attempt}-{secrets.token_hex(4)}"
    ticket = Ticket(name, fingerprint, route, attempt)
    content = {key: asdict(item) for key, item in {**known, purpose: ticket}.items()}
    write_atomically(run.file("azure", "jobs.json"), json.dumps(content, indent=2) + "\n")
    return ticket


def _submit(clients: Clients, ticket: Ticket, build: Callable[[str], Any]) -> Any:
    """Submit under the name; a job that has it already is ours, from an answer that was lost."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    doing = f"Submitting the job {ticket.name}"
    for left in reversed(range(TRIES)):
        job = build(ticket.name)  # anew: a try that failed leaves one half resolved
        try:
            with quiet_uploads():
                return clients.ml.jobs.create_or_update(job)
        except (AzureError, MlException) as error:
            there = _there(clients, ticket.name) if passing(error) else None
            if there is not None:
                return there
            if not left or not passing(error):
                raise stage_error(error, doing) from None
        time.sleep(clients.poll.interval)
    raise AssertionError("unreachable")


def _there(clients: Clients, name: str) -> Any | None:
    """The job, if Azure has it."""
    try:
        return look(lambda: clients.ml.jobs.get(name), f"Reading the job {name}")
    except StageError:  # Azure is in trouble; the next try will tell
        return None


def cancel_all(clients: Clients, run: Run) -> list[str]:
    """Cancel the run's jobs that still work; a line for each."""
    lines = []
    for ticket in tickets(run).values():
        doing = f"Cancelling the job {ticket.name}"
        job = look(partial(clients.ml.jobs.get, ticket.name), doing)
        if job is None or status_of(job) not in WORKING:
            continue
        with explained(doing):
            clients.ml.jobs.begin_cancel(ticket.name).wait(60)
        lines.append(f"cancelled the job {ticket.name}")
    return lines
