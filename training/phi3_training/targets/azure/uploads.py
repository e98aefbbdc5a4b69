"""What a job reads from this machine: sent once per content, to the workspace's own store.

The address is made of the content, so what any run has sent before is found and not sent again, and
an interrupted upload resumes with the missing files. A refusal ends it immediately. Code becomes a
code asset in addition ("Train models with REST", learn.microsoft.com).
"""

# azure-ai-ml would do all this when a job is submitted, and then only: it cannot send anything
# while the cluster is still being made, it sends every other file of a folder after one was
# refused, and it asks for a new place for the code at each try.

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from ...errors import StageError
from ...progress import Progress, note
from ...run import fingerprint, sha256_of
from .clients import Clients
from .failures import stage_error
from .jobs import OUTPUT_STORE, open_store
from .operations import TRIES, create, get_or_none, is_transient, within

_ROOT = "phi3/uploads"
_CODE = "phi3-code"  # the name of the code asset; its versions are contents
_CODES_API = "2024-04-01"
# Files under way at the same time; the SDK adds more connections for a large one.
_AT_ONCE = 8
_CONNECTIONS = 4


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
    content = [[name, _sha256(path, *_state(path))] for name, path in files.items()]
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


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


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
