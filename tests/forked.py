"""Python commands as processes that are forked from a server with the heavy libraries loaded.

`python -m phi3_training.cli up` spends 8 CPU seconds on importing torch, transformers and peft, and
`pf` 2.5 on what Prompt flow imports: more than most tests need for what they look at. A command
that is forked here is a process of its own all the same, with its own environment, folder, standard
streams, signals and exit status. It differs from a real one in what the operating system shows of
it: /proc/PID/cmdline and environ are the server's.

One server serves all workers of a test run. It ends when the last of them does. Where the start of
the interpreter is what a test is about (another PYTHONPATH, `-I`, warnings of an import), take
`subprocess`.

What a forked command starts with `sys.executable -m phi3_…` or `pf` is forked as well: its
sys.executable is a small program, `python` beside the server's socket. Where a job brings its own
copy of our packages, these are imported again from there, as the interpreter itself would.

    python tests/forked.py -c CODE    run it in a process forked from the server: pytest's workers,
                                      which else import for 20 CPU seconds each (see the Makefile)
    python tests/forked.py serve ADDRESS    be the server
"""

from __future__ import annotations

import array
import atexit
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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
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
    "phi3_rehearsal.control",
    "phi3_training.serve.server",
    "phi3_training.serve.engines.onnxruntime",
    "phi3_training.serve.engines.transformers",
    "sqlalchemy.orm",
    "sqlalchemy.dialects.sqlite",
    "opentelemetry.sdk.trace",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk.metrics",
    "azure.monitor.opentelemetry",
    "rich.console",
    "rich.syntax",
    "aiohttp",
    "flask_restx",
    "httpx",
    "dotenv",
    "tiktoken",
    "ruamel.yaml",
    "docstring_parser",
    "filetype",
    "keyring.core",
    "keyring.backends.chainer",
    "keyring.backends.SecretService",
    "keyring.backends.kwallet",
    "keyring.backends.libsecret",
    "keyring.backends.macOS",
    "keyring.backends.Windows",
    "keyrings.alt.file",
    "keyrings.alt.Gnome",
    "keyrings.alt.Google",
    "keyrings.alt.Windows",
    "keyrings.alt.keyczar",
    "keyrings.alt.multi",
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
    executable: str | None = None,
) -> Forked:
    """Start what `python COMMAND…` would; -m, -c and a script's path are understood.

    `executable`: its sys.executable, if not the program that forks.
    """
    request = {
        "command": list(command),
        "cwd": str(cwd or Path.cwd()),
        "env": dict(os.environ if env is None else env),
        "executable": executable,
    }
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a device
        streams = [(stdin or nothing).fileno(), stdout.fileno(), stderr.fileno()]
        return _request(_connection(), request, streams)


def _request(connection: socket.socket, request: dict[str, Any], streams: list[int]) -> Forked:
    ours, theirs = os.pipe()
    body = json.dumps(request).encode()
    rights = array.array("i", [*streams, theirs])
    connection.sendmsg(
        [len(body).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    )
    connection.sendall(body)
    os.close(theirs)
    return Forked(int(_line(ours)), ours)


FORKED_COMMANDS = (
    "-m phi3_",
    "-m torch.distributed.run",
    f"-c {PF_MAIN}",
    str(ROOT / "training" / "phi3_training" / "flow" / "describe.py"),
)
FLAGS = ("-u", "-B")  # that may stand before
# An endpoint of this machine hands its key out by its process id, which is the stand-in's when it
# is forked; the rehearsed Azure's servers do not.
SERVER, SERVERS_TOO = "-m phi3_training.serve ", "TESTS_FORK_SERVERS"
# What a forked process finds in sys.executable.
_PROGRAM = """\
#!{interpreter} -IS
import sys
sys.path.insert(0, {tests!r})
import forked
forked.stand_in({interpreter!r}, sys.argv[1:])
"""


@contextmanager
def forked_modules(*, start_server: bool = True) -> Iterator[None]:
    """In this block FORKED_COMMANDS are forked where a program starts them by sys.executable.

    `start_server=False`: only where the server runs, which costs more than it saves a few tests.
    """
    if not start_server and not (_folder() / "socket").exists():
        yield
        return
    _connection()
    own, path = sys.executable, os.environ.get("PYTHONPATH")
    sys.executable = str(_folder() / "bin" / "python")
    os.environ |= {"PYTHONPATH": PYTHONPATH, SERVERS_TOO: "1"}
    try:
        yield
    finally:
        sys.executable = own
        del os.environ["PYTHONPATH"], os.environ[SERVERS_TOO]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def stand_in(interpreter: str, words: list[str]) -> NoReturn:
    """Be `python WORDS…` for who started this process: forked if it is a module of ours.

    It ends when that one ends, and the other way round; signals are passed on.
    """
    address = Path(sys.argv[0]).parents[1] / "socket"
    connection = socket.socket(socket.AF_UNIX)
    named = " ".join(word for word in words if word not in FLAGS)
    ours = named.startswith(FORKED_COMMANDS) and _finds_ours(os.environ)
    if named.startswith(SERVER) and SERVERS_TOO not in os.environ:
        ours = False
    # 0, or why not: the tests may have ended, and with them the server.
    if not ours or connection.connect_ex(str(address)):
        os.execv(interpreter, [interpreter, *words])  # noqa: S606
    request = {"command": words, "cwd": str(Path.cwd()), "env": dict(os.environ), "tied": True}
    process = _request(connection, request, [0, 1, 2])
    connection.close()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: process.send_signal(number))
    _end(process.wait())


def _finds_ours(env: Mapping[str, str]) -> bool:
    """Whether an interpreter with these variables has our packages from this clone."""
    return set(env.get("PYTHONPATH", "").split(os.pathsep)) == set(PYTHONPATH.split(os.pathsep))


_connected: list[socket.socket] = []


def _folder() -> Path:
    return Path(os.environ["PHI3_TESTS_SHARED"]) / "forked"


def _connection() -> socket.socket:
    """This process's connection to the server, which is started where it does not run."""
    if not _connected:
        folder = _folder()
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
        except ImportError as error:  # an extra that is not installed; its tests are skipped
            if str(error.name).startswith("phi3_"):
                raise
    assert "promptflow" not in sys.modules, "it has read where this HOME's Prompt flow is"
    _set_by_imports.update({k: v for k, v in os.environ.items() if k not in before})
    programs = Path(address).with_name("bin")
    programs.mkdir()
    for program in Path(sys.executable).parent.iterdir():
        if not program.name.startswith("python"):
            (programs / program.name).symlink_to(program)
    python = programs / "python"
    python.write_text(_PROGRAM.format(interpreter=sys.executable, tests=str(ROOT / "tests")))
    python.chmod(0o700)
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
                _watched(json.loads(body), list(handles), str(python))
            for handle in handles:
                os.close(handle)


def _watched(request: dict[str, Any], handles: list[int], python: str) -> NoReturn:
    """Fork once more: this process reports how that one ended, and may end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, ended = handles
    child = os.fork()
    if child == 0:
        os.close(ended)
        for number, handle in enumerate(streams):
            os.dup2(handle, number)
            os.close(handle)
        sys.executable = request.get("executable") or python
        _become(request)
    for handle in (*streams, 0, 1, 2):
        os.close(handle)
    os.write(ended, b"%d\n" % child)
    if "tied" in request:
        events = select.poll()
        events.register(handle := os.pidfd_open(child), select.POLLIN)
        events.register(ended, 0)  # POLLERR: nobody reads it any more
        if handle not in dict(events.poll()):
            os.kill(child, signal.SIGKILL)
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
    flags = list(takewhile(FLAGS.__contains__, request["command"]))
    sys.dont_write_bytecode = "-B" in flags
    first, *rest = request["command"][len(flags) :]
    brought = (Path.cwd() / "phi3_training").is_dir() and Path.cwd() not in map(Path, sys.path)
    if brought or not first.startswith("-"):  # a job's own copies, a flow's
        for name in list(sys.modules):
            if name.startswith("phi3_"):
                del sys.modules[name]
    sys.path[0] = request["cwd"] if first.startswith("-") else str(Path(first).parent)
    sys.argv = [first, *rest]
    status = 0
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        else:
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            sys.stderr.write(f"{ended.code}\n")
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    _end(status)


def _end(status: int) -> NoReturn:
    """End as the interpreter does, but for its own tidying up.

    That takes every module apart, and with it 800 MB of pages that are still the server's: 1.5 CPU
    seconds, more than most commands need.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:  # nobody reads it any more
            status = status or 120
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        worker = start(
            sys.argv[1:],
            stdin=sys.stdin,
            stdout=sys.stdout,
            stderr=sys.stderr,
            executable=sys.executable,
        )
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker's end is this one's
        sys.exit(worker.wait())
