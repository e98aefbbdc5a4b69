"""Starts, finds and stops the process of a rehearsal, and runs commands inside one.

Reads and writes process.json (process and port) and control.log in the rehearsal's folder; reads
its journal calls.jsonl.
"""

from __future__ import annotations

import ctypes
import dataclasses
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

from .cloud import Cloud
from .faults import Fault, Faults, from_environment
from .identity import CLIENT, TENANT, client_secret
from .processes import ProcessId, RehearsalError, spawn, write_atomically
from .wire import Json

SUBSCRIPTION = "5ab5c817-0000-4000-8000-5ab5c8170000"
# It stops its jobs and servers first, and a server finishes the answers that it has begun.
_START_SECONDS, _STOP_SECONDS, _POLL_SECONDS = 60.0, 60.0, 0.05


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
        """Its public state: no secret."""
        names = {"folder": self.folder, "proxy": self.url, "ca_file": self.ca_file}
        return {"state": "running", **{k: str(v) for k, v in names.items()}, "pid": self.pid}

    def close(self) -> None:
        """Stop it, with every job and server it runs; its state stays in its folder."""
        stop(self.folder)

    def fault(self, text: str) -> Fault:
        """Inject a fault: `METHOD PATH KIND [name=value …]`."""
        return Faults(self.folder / "faults.json").add(text)

    def advance(self, seconds: float) -> Json:
        """Move its clock forward; its time then, and the runs of workflows that were due."""
        return advance(self.url, seconds)

    def calls(self) -> list[Json]:
        """Every call that was answered: time, method, host, path, status."""
        return calls(self.folder)


def held(folder: Path) -> dict[str, int]:
    """How many resources of each type the rehearsal of `folder` holds."""
    if not (folder / "state.json").is_file():
        return {}
    kinds = [str(doc["type"]).partition("/")[2] for doc in Cloud(folder).resources.values()]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def start(folder: Path, *, faults: Sequence[str] = ()) -> Rehearsal:
    """Start the rehearsal of `folder`, or find the one that runs. Raises RehearsalError."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        rehearsal = find(folder)
        if rehearsal is None:
            file, log = folder / "process.json", folder / "control.log"
            port = last_port(file)
            file.unlink(missing_ok=True)
            process = spawn("phi3_rehearsal", "serve", str(folder), str(port), log=log)
            deadline = time.monotonic() + _START_SECONDS
            # The process writes the file once it listens.
            while time.monotonic() < deadline and not file.is_file():
                if process.poll() is not None:
                    lines = log.read_text(encoding="utf-8").splitlines()
                    why = lines[-1] if lines else "its log is empty"
                    raise RehearsalError(f"The rehearsal did not start: {why}")
                time.sleep(_POLL_SECONDS)
            rehearsal = find(folder)
    if rehearsal is None:
        raise RehearsalError(f"The rehearsal did not start; see {folder / 'control.log'}")
    for text in [*from_environment(), *faults]:
        rehearsal.fault(text)
    return rehearsal


def find(folder: Path) -> Rehearsal | None:
    """The rehearsal of `folder`, if it runs."""
    try:
        saved = json.loads((folder / "process.json").read_text(encoding="utf-8"))
        process, port = ProcessId(saved["pid"], saved["create_time"]), int(saved["port"])
    except (OSError, ValueError, KeyError):
        return None
    if process.find() is None:
        return None
    url, ca_file = f"http://127.0.0.1:{port}", folder / "ca.pem"
    # The variables that lead the official SDKs to the rehearsal instead of Azure: azure-core, msal,
    # requests, the storage SDK and Prompt flow all read them, so that they use the real host names
    # and need no change of code.
    local, bundles = "localhost,127.0.0.1,::1", ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    environment = {
        "HTTPS_PROXY": url,
        "https_proxy": url,
        "NO_PROXY": local,
        "no_proxy": local,
        **dict.fromkeys((*bundles, "SSL_CERT_FILE"), str(ca_file)),
        "AZURE_TENANT_ID": TENANT,
        "AZURE_CLIENT_ID": CLIENT,
        "AZURE_CLIENT_SECRET": client_secret(Cloud(folder)),
        "AZURE_SUBSCRIPTION_ID": SUBSCRIPTION,
        # Read by azure-ai-ml when it is imported: seconds between two looks at a job's logs, which
        # grow from 2 to 60 by themselves.
        "AZUREML_RUN_POLLING_INTERVAL_MIN": "1",
        "AZUREML_RUN_POLLING_INTERVAL_MAX": "1",
    }
    return Rehearsal(folder, url, ca_file, process, environment)


def stop(folder: Path) -> bool:
    """Stop the rehearsal of `folder`; False when none runs."""
    rehearsal = find(folder)
    process = rehearsal.process.find() if rehearsal else None
    if process is None:
        return False
    try:
        process.terminate()
        process.wait(_STOP_SECONDS)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        raise RehearsalError(
            f"The rehearsal's process {process.pid} does not exit; kill it with: kill -9 "
            f"{process.pid}"
        ) from None
    return True


def advance(url: str, seconds: float) -> Json:
    """Move the clock of the rehearsal that answers at `url`. Raises RehearsalError."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    try:
        body = json.dumps({"seconds": seconds})
        connection.request("POST", "http://rehearsal.invalid/clock", body)
        reply = connection.getresponse()
        answer: Json = json.loads(reply.read())
    except (OSError, ValueError) as error:
        raise RehearsalError(f"The rehearsal did not answer: {error}") from None
    finally:
        connection.close()
    if reply.status != 200:
        raise RehearsalError(str(answer["error"]["message"]))
    return answer


def calls(folder: Path) -> list[Json]:
    """The journal of the rehearsal of `folder`."""
    path = folder / "calls.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_port(file: Path) -> int:
    """Where it listened before, for programs that still have its variables; 0 the first time."""
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError, KeyError):
        return 0


def write_process(folder: Path, port: int) -> None:
    """Say which process answers, and where; called by the process itself."""
    state = {**dataclasses.asdict(ProcessId.of(os.getpid())), "port": port}
    write_atomically(folder / "process.json", json.dumps(state))


# --- a command inside a rehearsal, and the calls it makes ---

_STORAGE = (".blob.core.windows.net", ".file.core.windows.net")
_PREFIX = re.compile(r"/subscriptions/[^/]+/resourceGroups/[^/]+/providers/", re.IGNORECASE)
# Variables of other ways to sign in, which azure-identity would try first.
_OTHER_SIGN_INS = (
    *("AZURE_AUTHORITY_HOST", "AZURE_CLIENT_CERTIFICATE_PATH", "AZURE_FEDERATED_TOKEN_FILE"),
    *("AZURE_TOKEN_CREDENTIALS", "IDENTITY_ENDPOINT", "MSI_ENDPOINT"),
)
_FOLLOW_SECONDS = 0.2
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def run_inside(command: Sequence[str], folder: Path) -> int:
    """Run `command` inside the rehearsal of `folder` (started if need be); its exit status.

    The calls that it makes are shown on standard error.
    """
    rehearsal = start(folder)
    own = {name: value for name, value in os.environ.items() if name not in _OTHER_SIGN_INS}
    environment = {**own, **rehearsal.env}
    if own.get("AZURE_SUBSCRIPTION_ID"):  # any subscription exists in a rehearsal
        environment["AZURE_SUBSCRIPTION_ID"] = own["AZURE_SUBSCRIPTION_ID"]
    ended = threading.Event()
    journal = rehearsal.folder / "calls.jsonl"
    shown_from = journal.stat().st_size if journal.is_file() else 0
    arguments = (journal, ended, sys.stderr, shown_from)
    follower = threading.Thread(target=follow, args=arguments, daemon=True)
    # Before the thread starts: preexec_fn is unsafe in a process with threads.
    process = subprocess.Popen(  # noqa: S603 - the caller's own command, no shell
        command, env=environment, preexec_fn=ends_with_parent()
    )
    follower.start()
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # at a terminal it reaches the child by itself
                if not sys.stdin.isatty():
                    process.send_signal(signal.SIGINT)
    finally:
        ended.set()
        follower.join(5)


def ends_with_parent() -> Callable[[], None] | None:
    """What a process calls so that the kernel kills it when its parent dies (Linux)."""
    # A killed `phi3 … --rehearse` must not leave its other half at work on the run.
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    return ask


def follow(path: Path, ended: threading.Event, out: TextIO, position: int = 0) -> None:
    """Show the journal's calls after byte `position` until `ended`, repeated polls only once."""
    seen: set[str] = set()
    count = 0
    while True:
        done = ended.wait(_FOLLOW_SECONDS)
        content = b""
        if path.is_file():
            with path.open("rb") as stream:
                stream.seek(position)
                content = stream.read()
        *lines, unfinished = content.split(b"\n")
        position += len(content) - len(unfinished)
        for line in lines:
            call = json.loads(line)
            count += 1
            of_storage = call["host"].endswith(_STORAGE)
            if of_storage:  # of files only which account they are in
                text = f"{call['method']} {call['host']}/…"
            else:  # ids without what all have in common
                text = f"{call['status']} {call['method']} {call['host']}{call['path']}"
                text = _PREFIX.sub("/…/", text)
            if text not in seen:
                out.write(f"rehearsal: {text}\n")
            if call["method"] not in ("GET", "HEAD") and not of_storage:
                seen.clear()  # something changed: the next answer to a poll is news
            seen.add(text)
        if done:
            out.write(f"rehearsal: {count} calls answered\n")
        out.flush()
        if done:
            return
