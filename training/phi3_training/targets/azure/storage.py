"""Files between this machine and the workspace's own storage: what jobs read, and what they wrote.

What a job reads is sent once per content: the address is made of the content, so what any run has
sent before is found and not sent again, and an interrupted upload resumes with the missing files. A
refusal ends it immediately. Code becomes a code asset in addition ("Train models with REST",
learn.microsoft.com).
"""

# azure-ai-ml would do all this when a job is submitted, and then only: it cannot send anything
# while the cluster is still being made, it sends every other file of a folder after one was
# refused, and it asks for a new place for the code at each try.

from __future__ import annotations

import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...errors import StageError
from ...progress import Progress, note
from ...run import fingerprint, sha256_of
from .clients import Clients
from .failures import explained, stage_error
from .operations import TRIES, create, get_or_none, is_transient, within

if TYPE_CHECKING:
    from azure.ai.ml.entities import Job
    from azure.storage.blob import BlobProperties, ContainerClient

OUTPUT_STORE, LOG_STORE = "workspaceblobstore", "workspaceartifactstore"
_DATASTORE_PATH = re.compile(r"datastores/(?P<store>[^/]+)/(?:paths/)?(?P<path>.+?)/?$")
_ROOT = "phi3/uploads"
_CODE = "phi3-code"  # the name of the code asset; its versions are contents
_CODES_API = "2024-04-01"
# Files under way at the same time; the SDK adds more connections for a large one.
_AT_ONCE = 8
_CONNECTIONS = 4
# Bytes; a larger file stays in Azure. Adapters and figures are far below, merged weights above.
_LARGEST = 512 * 2**20


@dataclass(frozen=True)
class Uploaded:
    """A file or folder in the store: its address for a job's input, and for a code asset."""

    path: str
    url: str
    digest: str


def upload(clients: Clients, source: Path, progress: Progress) -> Uploaded:
    """Send a file or folder where it is not there yet. StageError with Azure's reason.

    Hidden files stay here: a clone of weights has all of them once more below `.git`.
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    doing, work = f"Uploading {source.name}", partial(_upload, clients, source)
    for tries_left in reversed(range(TRIES)):
        try:
            return within(doing, work, progress, limit=clients.poll.upload_timeout)
        except (AzureError, MlException) as error:
            # A lost connection, also on the way to the store's key; what was sent is found again.
            if not (tries_left and is_transient(error)):
                raise stage_error(error, doing) from None
            note(progress, f"{doing}: trying again")
        time.sleep(clients.poll.interval)
    raise AssertionError("unreachable")


def _upload(clients: Clients, source: Path) -> Uploaded:
    files = {source.name: source}
    if source.is_dir():
        found = {path.relative_to(source): path for path in sorted(source.rglob("*"))}
        files = {
            f"{source.name}/{name.as_posix()}": path
            for name, path in found.items()
            if path.is_file() and not any(part.startswith(".") for part in name.parts)
        }
    if not files:
        raise StageError(f"{source} has no files to upload")
    content = [
        [name, _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)]
        for name, path in files.items()
    ]
    digest = fingerprint(content)[:32]
    prefix = f"{_ROOT}/{digest}"
    container, blobs = open_store(clients, OUTPUT_STORE, prefix)
    # A blob appears when it is complete, and only under the address of its own content.
    there = {str(blob.name): blob.size for blob in blobs}

    def send(name: str) -> None:
        size = files[name].stat().st_size
        with files[name].open("rb") as stream:
            container.upload_blob(
                f"{prefix}/{name}",
                stream,
                length=size,
                overwrite=True,
                max_concurrency=_CONNECTIONS,
            )

    missing = [n for n, path in files.items() if there.get(f"{prefix}/{n}") != path.stat().st_size]
    for name in missing[:1]:  # alone: where the store refuses it, nothing else is sent
        send(name)
    _send_all(send, missing[1:])
    where, address = f"{prefix}/{source.name}", container.url.partition("?")[0]
    return Uploaded(
        f"azureml://datastores/{OUTPUT_STORE}/paths/{where}", f"{address}/{where}", digest
    )


@lru_cache(maxsize=4096)
def _sha256(path: Path, _size: int, _changed: int) -> str:
    """The hash of a file that has not changed since: weights take seconds each time."""
    return sha256_of(path)


def _send_all(send: Callable[[str], None], names: Iterable[str]) -> None:
    """Send several at a time; after a failure no other is started, and the failure is raised."""
    # Not a pool of concurrent.futures: at its end Python would wait for all that is still queued,
    # also after Ctrl-C.
    waiting = deque(names)
    failures: list[BaseException] = []

    def work() -> None:
        while not failures:
            try:
                name = waiting.popleft()
            except IndexError:
                return
            try:
                send(name)
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures.append(error)

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(waiting)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def code_asset(clients: Clients, folder: Path, progress: Progress) -> str:
    """The ARM id of the code asset with the folder's files. StageError with Azure's reason."""
    sent = upload(clients, folder, progress)
    arm_id = f"{clients.place.workspace_id()}/codes/{_CODE}/versions/{sent.digest}"
    resources, doing = clients.resources.resources, "Registering the job's code"
    read = partial(resources.get_by_id, arm_id, api_version=_CODES_API)
    if get_or_none(read, doing) is None:
        body = {"properties": {"codeUri": sent.url, "description": "What a job of phi3 runs"}}
        put = partial(resources.begin_create_or_update_by_id, arm_id, body, api_version=_CODES_API)
        poll = clients.poll
        create(doing, put, read, progress, limit=poll.provision_timeout, pause=poll.interval)
    return arm_id


# --- the workspace's stores, and what a job has written there ---


def output_path(job_name: str, output: str) -> str:
    """The path a job writes one of our outputs to."""
    # Set by us, not by Azure, so that it is found without guessing.
    return f"azureml://datastores/{OUTPUT_STORE}/paths/phi3/{job_name}/{output}"


def path_of_output(job: Job, output: str) -> str:
    """Where an output is, as Azure says; where Azure does not say, as it was asked."""
    named = str(getattr((getattr(job, "outputs", None) or {}).get(output), "path", None) or "")
    return named if datastore_of(named) is not None else output_path(str(job.name), output)


def datastore_of(path: str) -> tuple[str, str] | None:
    """(store, path) of an `azureml://…/datastores/STORE/paths/PATH`; None for anything else."""
    match = _DATASTORE_PATH.search(path)
    # Until it has filled it in Azure answers a template: `…/paths/azureml/${{name}}/…`.
    return None if match is None or "${{" in path else (match["store"], match["path"])


def open_store(
    clients: Clients, store: str, prefix: str
) -> tuple[ContainerClient, list[BlobProperties]]:
    """A datastore's container and the blobs below `prefix`; keys stay in memory."""
    from azure.core.exceptions import HttpResponseError

    start = prefix.strip("/") + "/"
    try:
        container = _container(clients, store, with_key=True)
        return container, list(container.list_blobs(name_starts_with=start))
    except HttpResponseError as error:
        # Where a policy switches account keys off, the sign-in is left; it needs the role Storage
        # Blob Data Reader.
        if error.status_code not in (401, 403):
            raise
        container = _container(clients, store, with_key=False)
        return container, list(container.list_blobs(name_starts_with=start))


def _container(clients: Clients, store: str, *, with_key: bool) -> ContainerClient:
    from azure.core.credentials import AzureSasCredential
    from azure.storage.blob import ContainerClient, ExponentialRetry

    datastore: Any = clients.ml.datastores.get(store, include_secrets=with_key)
    secret = getattr(datastore, "credentials", None)
    key, sas = getattr(secret, "account_key", None), getattr(secret, "sas_token", None)
    credential: Any = clients.credential
    if with_key and key:
        credential = key
    elif with_key and sas:
        credential = AzureSasCredential(sas)
    endpoint = getattr(datastore, "endpoint", None) or "core.windows.net"
    return ContainerClient(
        f"https://{datastore.account_name}.blob.{endpoint}",
        datastore.container_name,
        credential=credential,
        # The storage SDK's default waits 15 s before its first retry.
        retry_policy=ExponentialRetry(initial_backoff=1, increment_base=2, retry_total=5),
        logging_enable=False,
    )


def fetch_output(clients: Clients, job: Job, output: str, folder: Path, progress: Progress) -> None:
    """Copy the files of a job's output over `folder`. StageError when there are none."""
    # Straight from the workspace's storage: azure-ai-ml before 1.35.1 may download nothing of a
    # named output and say nothing of it. Its own download is the last resort.
    doing = f"Fetching the output {output} of the job {job.name}"
    # Inside the folder, so on the same disk, and gone again whatever happens.
    with TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        content = Path(temporary)
        with explained(doing):
            count = 0
            asked = output_path(str(job.name), output)
            for path in dict.fromkeys((path_of_output(job, output), asked)):
                place = datastore_of(path)
                if place and not count:
                    count = _download_blobs(clients, *place, content, progress)
        if not count:
            fetch = partial(
                clients.ml.jobs.download,
                str(job.name),
                output_name=output,
                download_path=str(content),
            )
            with explained(doing):
                within(doing, fetch, progress, limit=clients.poll.upload_timeout)
            inner = content / "named-outputs" / output
            content = inner if inner.is_dir() else content
        if not any(path.is_file() for path in content.rglob("*")):
            raise StageError(
                f"The job {job.name} is completed, but its output {output} is empty. Check the "
                f"job in the studio; train again with: phi3 up --on azure --again finetune"
            )
        shutil.copytree(content, folder, dirs_exist_ok=True)


def _download_blobs(
    clients: Clients, store: str, prefix: str, folder: Path, progress: Progress
) -> int:
    """Download every blob below `prefix`; how many there were."""
    start = prefix.strip("/") + "/"
    container, blobs = open_store(clients, store, prefix)
    count = 0
    for blob in blobs:
        relative = Path(str(blob.name).removeprefix(start))
        # A store with a hierarchical namespace (Data Lake) lists its folders as empty blobs.
        is_folder = (blob.metadata or {}).get("hdi_isfolder") == "true"
        # The names come from a job, which anybody with the workspace may have written to.
        if is_folder or relative.is_absolute() or ".." in relative.parts:
            continue
        if (blob.size or 0) > _LARGEST:
            continue
        count += 1
        progress(count, len(blobs), f"fetching {relative}")
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            container.download_blob(blob.name).readinto(file)
    return count
