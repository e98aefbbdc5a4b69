"""Python commands as processes that are forked from a server with the heavy libraries loaded.

`python -m phi3_training.cli up` spends 8 CPU seconds on importing torch, transformers and peft, and
`pf` 2.5 on what Prompt flow imports: more than most tests need for what they look at. A command
that is forked here is a process of its own all the same, with its own environment, folder, standard
streams, signals and exit status. It differs from a real one in what the operating system shows of
it: /proc/PID/cmdline and environ are the server's.

One server serves all workers of a test run. It ends when the last of them does. Where the start of
the interpreter is what a test is about (another PYTHONPATH, `-I`, warnings of an import), take
`subprocess`.

    python tests/forked.py -c CODE    run it in a process forked from the server: pytest's workers,
                                      which else import for 20 CPU seconds each (see the Makefile)
    python tests/forked.py serve ADDRESS    be the server
"""

from __future__ import annotations

import array
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 180
# Not promptflow itself, only what it imports: it reads HOME while it is imported.
PRELOADED = (
    "phi3_training.finetune.sft",
    "phi3_training.finetune.base",
    "phi3_training.evaluate.compare",
    "phi3_training.serve.export",
    "phi3_training.targets.local",
    "phi3_training.targets.azure.clients",
    "phi3_training.targets.azure.target",
    "phi3_training.commands.up",
    "transformers.models.phi3.modeling_phi3",
    "onnxruntime",
    "mlflow.pyfunc",
    "openai.types.chat",
    "sqlalchemy.orm",
    "sqlalchemy.dialects.sqlite",
    "opentelemetry.sdk.trace",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "rich.console",
    "aiohttp",
    "flask_restx",
    "azure.core.pipeline.policies",
    "azure.ai.ml.entities",
    "azure.identity",
    "azure.mgmt.authorization",
    "azure.mgmt.msi",
    "azure.mgmt.quota",
    "azure.mgmt.resource.resources",
    "azure.storage.blob",
)
PYTHONPATH = os.pathsep.join([str(ROOT / "tools"), str(ROOT / "training")])
# What pip writes into the script `pf`.
PF_MAIN = "from promptflow._cli.pf import main; main()"


class Forked:
    """A process that runs; as far as it goes with the methods of `subprocess.Popen`."""

    def __init__(self, pid: int, ended: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = ended  # a pipe that gets the exit status

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends."""
        status = self._look(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = int(_line(self._ended))
            os.close(self._ended)
        return self.returncode


def arguments(command: Sequence[str], env: Mapping[str, str]) -> list[str] | None:
    """What `run` and `start` take for a command line; None where it has to be a real process."""
    program, *rest = command
    if env.get("PYTHONPATH") != PYTHONPATH:
        return None
    if Path(program).name == "pf":
        return ["-c", PF_MAIN, *rest]
    if program in ("python", sys.executable) and rest[0] in ("-m", "-c"):
        return rest
    return None


def run(
    command: Sequence[str],
    *,
    input: str | None = None,  # noqa: A002 - as in subprocess.run
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run what `python COMMAND…` would, e.g. ["-m", "phi3_training.cli", "runs"]; to its end."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write((input or "").encode())
        given.seek(0)
        process = start(command, stdin=given, stdout=out, stderr=err, cwd=cwd, env=env)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        printed = []
        for stream in (out, err):
            stream.seek(0)
            printed.append(stream.read().decode())
    return subprocess.CompletedProcess(command, status, *printed)


def run_or_start(
    words: Sequence[str],
    *,
    feed: str | None,
    cwd: Path,
    env: Mapping[str, str],
    timeout: float,
    apart: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end: forked where that can be, in a process of its own if not.

    `apart`: never forked. Without `feed` its standard input is empty.
    """
    if not apart and (forkable := arguments(words, env)) is not None:
        return run(forkable, input=feed, cwd=cwd, env=env, timeout=timeout)
    return subprocess.run(
        words,
        input=feed,
        stdin=subprocess.DEVNULL if feed is None else None,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        timeout=timeout,
        check=False,
    )


def start(
    command: Sequence[str],
    *,
    stdout: IO[Any],
    stderr: IO[Any],
    stdin: IO[Any] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Forked:
    """Start what `python COMMAND…` would; -m, -c and a script's path are understood."""
    request = {
        "command": list(command),
        "cwd": str(cwd or Path.cwd()),
        "env": dict(os.environ if env is None else env),
    }
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device
        streams = [(stdin or nothing).fileno(), stdout.fileno(), stderr.fileno()]
        ours, theirs = os.pipe()
        body = json.dumps(request).encode()
        connection = _connection()
        rights = array.array("i", [*streams, theirs])
        connection.sendmsg(
            [len(body).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        connection.sendall(body)
    os.close(theirs)
    return Forked(int(_line(ours)), ours)


_connected: list[socket.socket] = []


def _connection() -> socket.socket:
    """This process's connection to the server, which is started where it does not run."""
    if not _connected:
        folder = Path(os.environ["PHI3_TESTS_SHARED"]) / "forked"
        folder.mkdir(mode=0o700, exist_ok=True)
        _connected.append(_connect(folder))
    return _connected[0]


def _connect(folder: Path) -> socket.socket:
    address, log = folder / "socket", folder / "log"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        end = time.monotonic() + START_SECONDS
        server: subprocess.Popen[bytes] | None = None
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(address))
            except OSError:
                connection.close()
            else:
                return connection
            if server is None:
                with log.open("wb") as stream:
                    server = subprocess.Popen(
                        [sys.executable, str(Path(__file__)), "serve", str(address)],
                        env=_server_environment(folder),
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=stream,
                        start_new_session=True,
                    )
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, f"the server did not start: {log.read_text()}"
            time.sleep(0.05)


def _server_environment(folder: Path) -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
        # Libraries read it while they are imported: huggingface_hub places its cache below it.
        "HOME": str(folder),
        "PYTHONPATH": PYTHONPATH,
        "HF_HUB_OFFLINE": "1",
        # Threads that wait sleep: there are more processes than cores.
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "2000",
    }


def _line(pipe: int) -> bytes:
    """One line of a pipe, byte by byte: what follows is left in it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(pipe, 1)
        assert byte, "the fork server has died"
        line += byte
    return line


# Variables that packages set while they were imported, e.g. ours to switch telemetry off.
_set_by_imports: dict[str, str] = {}


def serve(address: str) -> None:
    """Fork a process for each request until nobody is connected any more."""
    before = set(os.environ)
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:  # an extra that is not installed; its tests are skipped
            continue
    assert "promptflow" not in sys.modules, "it has read where this HOME's Prompt flow is"
    _set_by_imports.update({k: v for k, v in os.environ.items() if k not in before})
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    connections: list[socket.socket] = []
    while True:
        for ready in select.select([listener, *connections], [], [])[0]:
            if ready is listener:
                connections.append(listener.accept()[0])
                continue
            head, rights, _, _ = ready.recvmsg(4, socket.CMSG_SPACE(4 * array.array("i").itemsize))
            if not head:
                connections.remove(ready)
                ready.close()
                if not connections:
                    Path(address).unlink()
                    return
                continue
            handles = array.array("i", rights[0][2])
            body = b""
            while len(body) < int.from_bytes(head, "big"):
                body += ready.recv(1 << 16)
            if os.fork() == 0:
                for connection in (listener, *connections):
                    connection.close()
                _watched(json.loads(body), list(handles))
            for handle in handles:
                os.close(handle)


def _watched(request: dict[str, Any], handles: list[int]) -> NoReturn:
    """Fork once more: this process reports how that one ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, ended = handles
    child = os.fork()
    if child == 0:
        os.close(ended)
        for number, handle in enumerate(streams):
            os.dup2(handle, number)
            os.close(handle)
        _become(request)
    for handle in (*streams, 0, 1, 2):
        os.close(handle)
    os.write(ended, b"%d\n" % child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.write(ended, b"%d\n" % status)
    finally:
        os._exit(0)


def _become(request: dict[str, Any]) -> NoReturn:
    """Be the process that `python COMMAND…` would be."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update({**_set_by_imports, **request["env"]})
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    buffering = 1 if "PYTHONUNBUFFERED" in os.environ else -1
    sys.stdout = sys.__stdout__ = open(  # noqa: SIM115
        1, "w", buffering, encoding="utf-8", closefd=False
    )
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    first, *rest = request["command"][request["command"][0] == "-u" :]
    sys.path[0] = request["cwd"] if first.startswith("-") else str(Path(first).parent)
    sys.argv = [first, *rest]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    else:
        runpy.run_path(first, run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        worker = start(sys.argv[1:], stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker's end is this one's
        sys.exit(worker.wait())
