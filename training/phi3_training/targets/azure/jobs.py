"""Jobs: named before they are submitted, submitted once, resumed after interruption, followed.

Reads and writes <run>/azure/jobs.json (which job does what for this run) and writes
<run>/azure/<purpose>.log (without secrets).
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, Literal

from ... import console
from ...errors import StageError
from ...manifests import MetricsManifest, ModelManifest
from ...progress import Progress, no_progress, note
from ...run import Run, write_atomically
from .clients import Clients
from .failures import explained, message_of, scrub, stage_error
from .in_job import ERROR, PROGRESS
from .operations import TRIES, get_or_none, is_transient, meanwhile, paced, within
from .storage import LOG_STORE, datastore_of, open_store

if TYPE_CHECKING:
    from azure.ai.ml.entities import Job

log = logging.getLogger(__name__)

Purpose = Literal["train", "evaluate"]
TRAIN: Purpose = "train"
EVALUATE: Purpose = "evaluate"
WORKING = frozenset(
    ("notstarted", "queued", "preparing", "provisioning", "starting", "running", "finalizing")
)
_BAD_ENDS = {
    "failed": "failed",
    "canceled": "was cancelled",
    "cancelled": "was cancelled",
    "notresponding": "stopped responding (its machine may be gone)",
    "paused": "was paused",
}
_STAGES: dict[Purpose, type[ModelManifest | MetricsManifest]] = {
    TRAIN: ModelManifest,
    EVALUATE: MetricsManifest,
}
_SHOWN_LINES = 8  # last log lines in an error
# Failed looks at the status in a row before phi3 gives up: a minute at the default 10 s each. The
# job itself is not concerned.
_PATIENCE = 6
_REASON_SECONDS = 120.0  # for Azure's words about a job that failed
# The log of the first process of the first machine, which the SDK shows as well; then what there
# is. A pipeline has only the second kind.
_LOG_NAMES = (
    re.compile(r"/user_logs/std_log(_process_0+)?\.txt$"),
    re.compile(r"/user_logs/.*\.txt$"),
    re.compile(r"/logs/azureml/.*\.txt$"),
)


@dataclass(frozen=True)
class JobRecord:
    """A job of this run: its name in Azure and the inputs that it was made for."""

    name: str
    fingerprint: str
    route: str
    attempt: int


def recorded_jobs(run: Run) -> dict[str, JobRecord]:
    """The run's jobs by purpose. StageError where the file cannot be read."""
    path = run.path / "azure" / "jobs.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {purpose: JobRecord(**item) for purpose, item in content.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        raise StageError(
            f"{path} is not a file that phi3 wrote. A job may still be running: check in the "
            f"studio, cancel it there, and delete the file"
        ) from None


def status_of(job: Job) -> str:
    """The job's status in lower case: an enumeration in azure-ai-ml 1.35, a string before."""
    status = getattr(job, "status", None)
    return str(getattr(status, "value", status) or "").lower()


def run_job(
    clients: Clients,
    run: Run,
    purpose: Purpose,
    fingerprint: str,
    route: str,
    build: Callable[[str], Job],
    progress: Progress,
    *,
    limit: float,
    in_parallel: Callable[[Progress], object] | None = None,
) -> Job:
    """The completed job for these inputs: the recorded one, resumed, or a new one.

    `build` makes the job to submit under a name; `limit` is in seconds; `in_parallel` is done while
    the job is at work. Raises StageError when the job fails or is cancelled, or when another job of
    the run is still running.
    """
    record, job = _resumable(clients, run, purpose, fingerprint)
    if record is None:
        known = recorded_jobs(run)
        attempt = known[purpose].attempt + 1 if purpose in known else 1
        run_name = "".join(c if c.isalnum() else "-" for c in run.name.lower())[:40].strip("-")
        # The random part keeps two clones with a run of the same name from sharing a job.
        name = f"phi3-{purpose}-{run_name}-{attempt}-{secrets.token_hex(4)}"
        record = JobRecord(name, fingerprint, route, attempt)
        content = {key: asdict(item) for key, item in {**known, purpose: record}.items()}
        # On disk before Azure sees the name: a process that is killed now finds the job again.
        write_atomically(run.file("azure", "jobs.json"), json.dumps(content, indent=2) + "\n")
    if job is None:
        note(progress, f"submitting the job {record.name}")
        job = _submit(clients, record.name, build, progress)
    else:
        note(progress, f"resuming the job {record.name}")
    if status_of(job) != "completed":
        with meanwhile(progress, in_parallel) as both:
            job = follow_job(clients, run, purpose, record.name, both, limit=limit)
    return job


def _resumable(
    clients: Clients, run: Run, purpose: Purpose, fingerprint: str
) -> tuple[JobRecord | None, Job | None]:
    """The record to continue with and its job; (record, None) was never submitted."""
    record = recorded_jobs(run).get(purpose)
    if record is None:
        return None, None
    job = _find(clients, record.name)
    same = record.fingerprint == fingerprint
    if job is None:  # killed after the name was written, before the call: the name is unused
        return (record, None) if same else (None, None)
    status = status_of(job)
    if status in WORKING or status == "cancelrequested":
        if not same:
            raise StageError(
                f"The job {record.name} of this run is still active ({status}), with other "
                f"settings or chats. Wait for it with its own settings, or cancel it: phi3 azure "
                f"cancel --run {run.name}"
            )
        return record, job
    # A job that the stage has used already is not used again: to train again means a new job.
    stage = run.read(_STAGES[purpose])
    used = stage is not None and stage.job == record.name
    return (record, job) if status == "completed" and same and not used else (None, None)


def _submit(clients: Clients, name: str, build: Callable[[str], Job], progress: Progress) -> Job:
    """Submit under the name. A job that already has it is ours: the answer to a PUT was lost."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    job: Job | None
    body: Job | None = None
    for tries_left in reversed(range(TRIES)):
        # What a refused try has uploaded is named in the body by then, so the next uploads nothing.
        body = body or build(name)
        try:
            job = within(
                f"submitting the job {name}",
                partial(clients.ml.jobs.create_or_update, body),
                progress,
                limit=clients.poll.upload_timeout,
            )
        except (AzureError, MlException) as error:
            if isinstance(error, MlException):  # a fault of an upload may leave the body half done
                body = None
            try:
                job = _find(clients, name) if is_transient(error) else None
            except StageError:  # Azure is in trouble; the next try will show
                job = None
            if job is None and not (tries_left and is_transient(error)):
                raise stage_error(error, f"Submitting the job {name}") from None
        if job is not None:
            return job
        time.sleep(clients.poll.interval)
    raise AssertionError("unreachable")


def _find(clients: Clients, name: str) -> Job | None:
    return get_or_none(lambda: clients.ml.jobs.get(name), f"Reading the job {name}")


def cancel_all(clients: Clients, run: Run) -> list[str]:
    """Cancel the run's jobs that are still at work; a line for each."""
    lines = []
    for record in recorded_jobs(run).values():
        job = _find(clients, record.name)
        if job is None or status_of(job) not in WORKING:
            continue
        with explained(f"Cancelling the job {record.name}"):
            # Enough to hear that Azure has accepted; the job ends in its own time.
            clients.ml.jobs.begin_cancel(record.name).wait(60)
        lines.append(f"cancelled the job {record.name}")
    return lines


def others_at_work(clients: Clients, run: Run, cluster: str) -> list[str]:
    """The jobs on the cluster that are not the run's own and have not ended.

    StageError where Azure does not list the jobs.
    """
    own = {record.name for record in recorded_jobs(run).values()}
    with explained(f"Listing the jobs on the cluster {cluster}"):
        return [
            str(job.name)
            for job in clients.ml.jobs.list()
            if job.name not in own
            and status_of(job) in WORKING
            and compute_of(job).rsplit("/", 1)[-1].lower() == cluster.lower()
        ]


def compute_of(job: Job) -> str:
    """The name or ARM id of a job's compute; a pipeline has it among its settings."""
    settings = getattr(job, "settings", None)
    compute = getattr(job, "compute", None) or getattr(settings, "default_compute", None)
    return str(compute or "").removeprefix("azureml:")


class JobLog:
    """What a job has logged so far: lines for people and the file, its progress and its error."""

    def __init__(self, file: IO[str], progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self.ended = threading.Event()  # the job has; what is left of its log is read once more
        self.closed = False  # nobody waits for the job any more
        self.last_lines: deque[str] = deque(maxlen=_SHOWN_LINES)
        self.error: str | None = None
        self.last_progress: tuple[int, int, str] = (0, 0, "")

    def take(self, line: str) -> None:
        """Show one line and write it to the file, or note the progress or error that it carries."""
        if not line or self.closed:
            return
        if line.startswith(PROGRESS):
            try:
                done, total, text = json.loads(line.removeprefix(PROGRESS))
                self.last_progress = (int(done), int(total), str(text))
            except (ValueError, TypeError):
                return
            self._progress(*self.last_progress)
            return
        line = scrub(line)
        if line.startswith(ERROR):
            message = line.removeprefix(ERROR)
            try:
                self.error = str(json.loads(message))
            except ValueError:
                self.error = message.strip()
            return
        self._file.write(line + "\n")
        self._file.flush()
        self.last_lines.append(line)
        console.note(line)


def follow_job(
    clients: Clients,
    run: Run,
    purpose: Purpose,
    name: str,
    progress: Progress,
    *,
    limit: float,
) -> Job:
    """The job when it is completed. StageError for every other end; Ctrl-C leaves it running."""
    # Not by the SDK's `jobs.stream`: it has no time limit and cannot be stopped, prints a refusal
    # of the storage service as if it were the log, and returns normally for a job that was
    # cancelled.
    resume = _resume(run)
    log_path = run.file("azure", f"{purpose}.log")
    with log_path.open("w", encoding="utf-8") as file:
        job_log = JobLog(file, progress)
        # In a thread of its own: where the storage cannot be reached, its retries take minutes.
        reader = threading.Thread(
            target=_read_until_ended, args=(clients, name, job_log), daemon=True
        )
        reader.start()
        try:
            job = _until_done(clients, run, name, job_log, progress, limit)
            job_log.ended.set()
            # Two polls, and time to fetch the last lines.
            reader.join(2 * clients.poll.job_interval + 10)
        except KeyboardInterrupt:
            console.note(f"The job {name} is still running in Azure and bills until it ends.")
            console.note(f"Resume: {resume}")
            console.note(f"Cancel it: phi3 azure cancel --run {run.name}")
            raise
        finally:
            job_log.closed = True
            job_log.ended.set()
    status = status_of(job)
    if status == "completed":
        return job
    parts = [f"The job {name} {_BAD_ENDS.get(status, f'ended as {status}')}."]
    reason = job_log.error or (_azures_reason(clients, name) if status == "failed" else None)
    if reason:
        parts.append(reason)
    if job_log.last_lines:
        parts.append("Its last lines:\n" + "\n".join(f"  {line}" for line in job_log.last_lines))
    parts.append(
        f"The full log: {log_path}\nFix the cause; then the same command starts a new job: {resume}"
    )
    raise StageError("\n".join(parts))


def _resume(run: Run) -> str:
    return f"phi3 up --on azure --run {run.name}"


def _until_done(
    clients: Clients, run: Run, name: str, job_log: JobLog, progress: Progress, limit: float
) -> Job:
    """Poll the status until the job has ended."""
    from azure.core.exceptions import AzureError

    started, failures, page = time.monotonic(), 0, None
    while True:
        try:
            job: Job = clients.ml.jobs.get(name)
            failures = 0
        except AzureError as error:
            failures += 1
            # Whatever it is, 404 and 401 among them: it could be read a moment ago, and only our
            # looking is concerned, not the job.
            if failures > _PATIENCE:
                raise StageError(
                    f"The job {name} may still be running, but its status cannot be read: "
                    f"{message_of(error)}. Resume: {_resume(run)}"
                ) from None
            time.sleep(clients.poll.job_interval)
            continue
        if page is None:
            page = getattr(job, "studio_url", None)
            if page:
                console.note(f"Web View: {page}")
        status = status_of(job)
        if status == "completed" or status in _BAD_ENDS:
            return job
        seconds = time.monotonic() - started
        done, total, text = job_log.last_progress
        progress(done, total, f"{status}, {seconds:.0f} s{': ' + text if text else ''}")
        if seconds > limit:
            raise StageError(
                f"The job {name} is still {status} after {limit:.0f} s and may bill. Wait longer: "
                f"{_resume(run)}; or cancel it: phi3 azure cancel --run {run.name}"
            )
        time.sleep(paced(seconds, clients.poll.job_interval))


def _azures_reason(clients: Clients, name: str) -> str | None:
    """Code and message of a failed job's error."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    # A job's own fields do not have them; the SDK's stream of an ended job raises them at its end,
    # after it has read the whole log once more.
    read = partial(clients.ml.jobs.stream, name)
    try:
        within(f"reading the end of the job {name}", read, no_progress, limit=_REASON_SECONDS)
    except MlException as error:
        match = re.search(r"\{.*\}", str(error), re.DOTALL)  # JSON inside a text
        try:
            details = json.loads(match[0])["error"] if match else {}
            return scrub(f"{details['code']}: {details['message']}")
        except (ValueError, KeyError, TypeError):
            return message_of(error)
    except (
        StageError,
        AzureError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as e:
        log.info("the reason of %s is not available: %s", name, scrub(str(e)))
    return None


def _read_until_ended(clients: Clients, name: str, job_log: JobLog) -> None:
    """Hand over the log's new lines, until the job's end has been seen."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    seen = 0
    while True:
        is_last = job_log.ended.is_set()
        try:
            lines = _read_log(clients, name, whole=is_last)
            for line in lines[seen:]:
                job_log.take(line)
            seen = max(seen, len(lines))
        except (AzureError, MlException, OSError, ValueError, AttributeError, TypeError) as error:
            log.info("the log of %s is not available: %s", name, scrub(str(error)))
        if is_last:
            return
        job_log.ended.wait(clients.poll.job_interval)


def _read_log(clients: Clients, name: str, *, whole: bool) -> list[str]:
    """The log so far; unless `whole`, without a last line that is still being written."""
    job = clients.ml.jobs.get(name)
    default = (getattr(job, "outputs", None) or {}).get("default")
    named = datastore_of(str(getattr(default, "path", None) or ""))
    # Where Azure does not say: the folder that every job's own files go to.
    store, prefix = named or (LOG_STORE, f"ExperimentRun/dcid.{name}")
    container, blobs = open_store(clients, store, prefix)
    names = sorted(str(blob.name) for blob in blobs)
    for pattern in _LOG_NAMES:
        for blob_name in names:
            if pattern.search(blob_name):
                # In full each time, as the SDK does.
                content: bytes = container.download_blob(blob_name).readall()
                text = content.decode("utf-8", "replace")
                end = len(text) if whole else text.rfind("\n") + 1
                # Of a line that a progress bar has written over, what stands there now.
                lines = text[:end].removesuffix("\n").split("\n") if end else []
                return [line.rstrip().rpartition("\r")[2] for line in lines]
    return []
