"""Brings a job's files back into the run folder, straight from the workspace's storage.

Reads the datastore's key into memory only; where keys are switched off it uses the sign-in.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...console import ProgressCallback
from ...errors import StageError
from .clients import Clients
from .failures import explained

STORE = "workspaceblobstore"
LARGEST = 512 * 2**20  # a larger file stays in Azure
_PLACE = re.compile(r"/datastores/(?P<store>[^/]+)/paths/(?P<path>.+?)/?$")


def output_path(job: str, output: str) -> str:
    """Where an output of ours is told to go, so that it can be found without guessing."""
    return f"azureml://datastores/{STORE}/paths/phi3/{job}/{output}"


def place_of_output(job: Any, output: str) -> str:
    """Where an output lies, as Azure says; where it does not say, as it was told."""
    named = str(getattr((job.outputs or {}).get(output), "path", None) or "")
    settled = _PLACE.search(named) is not None and "${{" not in named
    return named if settled else output_path(str(job.name), output)


def fetch(clients: Clients, job: Any, output: str, into: Path, progress: ProgressCallback) -> None:
    """Copy the files of a job's output over `into`. StageError when there are none."""
    doing = f"Fetching the output {output} of the job {job.name}"
    with TemporaryDirectory(dir=into, prefix=".fetching-") as folder:
        temporary = Path(folder)
        with explained(doing):
            count = 0
            told = output_path(str(job.name), output)
            for place in dict.fromkeys((place_of_output(job, output), told)):
                match = _PLACE.search(place)
                if match and not count:
                    count = _copy(clients, match["store"], match["path"], temporary, progress)
        if not count:
            with explained(doing):
                clients.ml.jobs.download(
                    str(job.name), output_name=output, download_path=str(temporary)
                )
            inner = temporary / "named-outputs" / output
            temporary = inner if inner.is_dir() else temporary
        if not any(path.is_file() for path in temporary.rglob("*")):
            raise StageError(
                f"The job {job.name} is completed, but its output {output} is empty. Look at the "
                "job in the studio; train again with: phi3 up --on azure --again finetune"
            )
        shutil.copytree(temporary, into, dirs_exist_ok=True)


def _copy(clients: Clients, store: str, prefix: str, into: Path, progress: ProgressCallback) -> int:
    """Download every blob below `prefix`; how many there were."""
    start = prefix.strip("/") + "/"
    container, blobs = container_of(clients, store, prefix)
    count = 0
    for blob in blobs:
        relative = Path(str(blob.name).removeprefix(start))
        is_folder = (blob.metadata or {}).get("hdi_isfolder") == "true"
        if is_folder or relative.is_absolute() or ".." in relative.parts:
            continue
        if (blob.size or 0) > LARGEST:
            continue
        count += 1
        progress(count, len(blobs), f"fetching {relative}")
        target = into / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            container.download_blob(blob.name).readinto(file)
    return count


def container_of(clients: Clients, store: str, prefix: str) -> tuple[Any, list[Any]]:
    """The store's container and the blobs below `prefix`: by key or signature, else by sign-in."""
    from azure.core.exceptions import HttpResponseError

    start = prefix.strip("/") + "/"
    try:
        container = _container(clients, store, with_key=True)
        return container, list(container.list_blobs(name_starts_with=start))
    except HttpResponseError as error:
        if error.status_code not in (401, 403):
            raise
        container = _container(clients, store, with_key=False)
        return container, list(container.list_blobs(name_starts_with=start))


def _container(clients: Clients, store: str, *, with_key: bool) -> Any:
    from azure.core.credentials import AzureSasCredential
    from azure.storage.blob import ContainerClient, ExponentialRetry

    found: Any = clients.ml.datastores.get(store, include_secrets=with_key)
    secret = getattr(found, "credentials", None)
    key, sas = getattr(secret, "account_key", None), getattr(secret, "sas_token", None)
    credential: Any = clients.credential
    if with_key and key:
        credential = key
    elif with_key and sas:
        credential = AzureSasCredential(sas)
    endpoint = getattr(found, "endpoint", None) or "core.windows.net"
    return ContainerClient(
        f"https://{found.account_name}.blob.{endpoint}",
        found.container_name,
        credential=credential,
        # The default waits 15 s after the first fault.
        retry_policy=ExponentialRetry(initial_backoff=1, increment_base=2, retry_total=5),
        logging_enable=False,
    )
