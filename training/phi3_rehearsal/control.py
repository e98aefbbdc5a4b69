"""Starts, finds and stops the process of a rehearsal; what leads the SDKs to it.

Reads and writes process.json (pid and port) and control.log in the rehearsal's folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock

from .cloud import CLIENT, TENANT, Cloud
from .errors import RehearsalError
from .faults import Fault, Faults, from_environment
from .processes import ProcessId, child_environment, write_atomically
from .signin import client_secret
from .wire import Json

SUBSCRIPTION = "5ab5c817-0000-4000-8000-5ab5c8170000"
_MODULE = "phi3_rehearsal"
_WAIT_SECONDS, _POLL_SECONDS = 60.0, 0.05


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsed Azure that answers. `env` is what a command needs to be inside it."""

    folder: Path
    url: str
    ca_file: Path
    process: ProcessId
    env: dict[str, str] = field(repr=False)

    @property
    def pid(self) -> int:
        """The id of its process."""
        return self.process.pid

    def about(self) -> Json:
        """What anybody may know of it: no secret."""
        return {
            "state": "running",
            "folder": str(self.folder),
            "proxy": self.url,
            "ca_file": str(self.ca_file),
            "pid": self.pid,
        }

    def close(self) -> None:
        """Stop it, with every job and server it runs; what it knows stays in its folder."""
        stop(self.folder)

    def fault(self, text: str) -> Fault:
        """Inject a fault: `METHOD PATH KIND [name=value …]`."""
        return Faults(self.folder / "faults.json").add(text)

    def calls(self) -> list[Json]:
        """Every call that was answered: time, method, host, path, status."""
        return calls(self.folder)


def held(folder: Path) -> dict[str, int]:
    """What the rehearsal of `folder` holds: how many of each type."""
    if not (folder / "state.json").is_file():
        return {}
    kinds = [str(doc["type"]).partition("/")[2] for doc in Cloud(folder).resources.values()]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def start(folder: Path, *, faults: Sequence[str] = ()) -> Rehearsal:
    """Start the rehearsal of `folder`, or find the one that runs. Raises RehearsalError."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        found = find(folder)
        if found is None:
            _spawn(folder)
            found = find(folder)
    if found is None:
        raise RehearsalError(f"The rehearsal did not start; see {folder / 'control.log'}")
    for text in [*from_environment(), *faults]:
        found.fault(text)
    return found


def find(folder: Path) -> Rehearsal | None:
    """The rehearsal of `folder`, if it runs."""
    file = folder / "process.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        process, port = ProcessId(known["pid"], known["create_time"]), int(known["port"])
    except (OSError, ValueError, KeyError):
        return None
    if process.find() is None:
        return None
    url = f"http://127.0.0.1:{port}"
    return Rehearsal(folder, url, folder / "ca.pem", process, environment_of(folder, url))


def stop(folder: Path, timeout: float = 60.0) -> bool:
    """Stop the rehearsal of `folder`; False when none runs."""
    found = find(folder)
    if found is None:
        return False
    try:
        process = psutil.Process(found.pid)
        process.terminate()
        process.wait(timeout)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        raise RehearsalError(
            f"The rehearsal's process {found.pid} does not end; end it with: kill -9 {found.pid}"
        ) from None
    return True


def environment_of(folder: Path, url: str) -> dict[str, str]:
    """The variables with which the official SDKs reach the rehearsal instead of Azure."""
    ca_file = str(folder / "ca.pem")
    secret = client_secret(Cloud(folder))
    return {
        "HTTPS_PROXY": url,
        "https_proxy": url,
        "NO_PROXY": "localhost,127.0.0.1,::1",
        "no_proxy": "localhost,127.0.0.1,::1",
        "REQUESTS_CA_BUNDLE": ca_file,
        "CURL_CA_BUNDLE": ca_file,
        "SSL_CERT_FILE": ca_file,
        "AZURE_TENANT_ID": TENANT,
        "AZURE_CLIENT_ID": CLIENT,
        "AZURE_CLIENT_SECRET": secret,
        "AZURE_SUBSCRIPTION_ID": SUBSCRIPTION,
        # Read by azure-ai-ml: how often a job's logs are asked for.
        "AZUREML_RUN_POLLING_INTERVAL_MIN": "1",
        "AZUREML_RUN_POLLING_INTERVAL_MAX": "1",
    }


def calls(folder: Path) -> list[Json]:
    """The journal of the rehearsal of `folder`."""
    path = folder / "calls.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _spawn(folder: Path) -> None:
    """Start the process and wait until it tells its port."""
    file = folder / "process.json"
    port = _last_port(file)
    file.unlink(missing_ok=True)
    with (folder / "control.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", _MODULE, "serve", str(folder), str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_environment(),
            start_new_session=True,  # it outlives the command that started it
        )
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline and not file.is_file():
        if process.poll() is not None:
            lines = (folder / "control.log").read_text(encoding="utf-8").splitlines()
            why = lines[-1] if lines else "its log is empty"
            raise RehearsalError(f"The rehearsal did not start: {why}")
        time.sleep(_POLL_SECONDS)


def _last_port(file: Path) -> int:
    """Where it listened before, so that those who were told find it again; 0 for the first time."""
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError, KeyError):
        return 0


def write_process(folder: Path, port: int) -> None:
    """Tell who answers, and where; called by the process itself."""
    state = {**dataclasses.asdict(ProcessId.of(os.getpid())), "port": port}
    write_atomically(folder / "process.json", json.dumps(state))
