"""A HOME of its own for Prompt flow's command line, and an endpoint that remembers what it got.

Writes only below the folder it is given. Stops every process that it or `pf` left behind, by id.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import psutil
from tests import forked

ROOT = Path(__file__).parents[2]
PF = Path(sys.executable).with_name("pf")
# Neither telemetry nor the trace service: what README advises, for this HOME alone.
PF_SETTINGS = "telemetry:\n  enabled: false\ntrace:\n  destination: none\n"
CONNECT = """
import sys
from phi3_training.flow.store import write_connection
name, endpoint = sys.argv[1:]
write_connection(name, endpoint, sys.stdin.read())
"""


Process = subprocess.Popen[bytes] | forked.Forked


@dataclass
class Done:
    """A finished command: exit code and everything it printed."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


@dataclass
class PfHome:
    """One isolated Prompt flow: its HOME, store, keyring and services."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)

    @property
    def pf_dir(self) -> Path:
        return self.path / ".promptflow"

    def run(
        self,
        command: Sequence[str | Path],
        *,
        feed: str | None = None,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        timeout: float = 90,
    ) -> Done:
        """Run a command in this HOME; its output is also kept in `printed`."""
        words, merged = [str(part) for part in command], {**self.env, **(env or {})}
        done = forked.run_or_start(words, feed=feed, cwd=cwd, env=merged, timeout=timeout)
        self.printed.append(done.stdout + done.stderr)
        return Done(done.returncode, done.stdout, done.stderr)

    def start(
        self,
        command: Sequence[str | Path],
        *,
        log: IO[Any],
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> Process:
        """Start a command that stays; what it prints goes into a file."""
        words, merged = [str(part) for part in command], {**self.env, **(env or {})}
        if (forkable := forked.arguments(words, merged)) is not None:
            return forked.start(forkable, stdout=log, stderr=log, cwd=cwd, env=merged)
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=cwd, env=merged
        )

    def pf(self, *arguments: str | Path, **options: Any) -> Done:
        return self.run([PF, *arguments], **options)

    def python(self, code: str, *arguments: str, **options: Any) -> Done:
        return self.run([sys.executable, "-c", code, *arguments], **options)

    def connect(self, endpoint: str, key: str, name: str = "phi3_connection") -> None:
        """Write a connection the way `phi3 connect` does."""
        done = self.python(CONNECT, name, endpoint, feed=key)
        assert done.code == 0, done.text

    def copy_flow(self) -> Path:
        """A copy of the chat flow and the source it includes, laid out as in the repository."""
        for part in ("flows/phi3_chat", "tools/phi3_tool"):
            shutil.copytree(
                ROOT / part,
                self.path / "clone" / part,
                ignore=shutil.ignore_patterns("__pycache__", ".promptflow"),
            )
        return self.path / "clone/flows/phi3_chat"

    def stop_processes(self) -> None:
        """Stop whatever still runs with this HOME: the Prompt flow service detaches itself."""
        ours = self.processes()
        for process in ours:
            process.terminate()
        for process in psutil.wait_procs(ours, timeout=5)[1]:
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """What runs with this HOME at the moment."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("PF_HOME_DIRECTORY") == str(self.pf_dir)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            return False


@contextmanager
def pf_home(path: Path) -> Iterator[PfHome]:
    """An isolated Prompt flow below `path`, without a system keyring, services or telemetry."""
    home = PfHome(path)
    home.pf_dir.mkdir(parents=True)
    (home.pf_dir / "pf.yaml").write_text(PF_SETTINGS, encoding="utf-8")
    temporary = path / "tmp"
    temporary.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
    home.env = {
        **kept,
        "PATH": f"{PF.parent}{os.pathsep}{kept.get('PATH', '')}",
        "HOME": str(path),
        "TMPDIR": str(temporary),
        "PF_HOME_DIRECTORY": str(home.pf_dir),
        "PYTHONPATH": forked.PYTHONPATH,
        "NO_PROXY": "*",
        "PF_WORKER_COUNT": "2",
    }
    try:
        yield home
    finally:
        home.stop_processes()


@dataclass
class Endpoint:
    """A stand-in for a deployed model: `POST /score` with a Bearer key, echoing the question."""

    key: str
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        return [body["input_data"]["input_string"] for body in self.bodies]


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers.get("Authorization") != f"Bearer {endpoint.key}":
                self._reply(401, {"message": "the key is not valid"})
                return
            endpoint.bodies.append(body)
            messages = body["input_data"]["input_string"]
            self._reply(200, {"output": f"{len(messages)}: {messages[-1]['content']}"})

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            pass

    return Handler


@contextmanager
def endpoint(key: str) -> Iterator[Endpoint]:
    """Serve an `Endpoint` on a free port of this machine."""
    state = Endpoint(key)
    with listening(_handler(state)) as port:
        state.url = f"http://127.0.0.1:{port}/score"
        yield state


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler], port: int = 0) -> Iterator[int]:
    """Answer with a handler while the block runs; the port, a free one for 0."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def interrupt(process: Process) -> None:
    """End a command as Ctrl+C does; harder if it does not listen."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


BLOCKER = """
import importlib.machinery, os, sys

class NotInstalled:
    'phi3_tool exists only where it was copied to: a temporary folder below TMPDIR.'
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition('.')[0] not in ('phi3_tool', 'phi3_training') or path is not None:
            return None
        copies = [entry for entry in sys.path if entry.startswith(os.environ['TMPDIR'])]
        found = importlib.machinery.PathFinder.find_spec(name, copies)
        if found is None:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        return found

sys.meta_path.insert(0, NotInstalled)
"""


def without_phi3_tool(home: PfHome) -> dict[str, str]:
    """Environment in which phi3_tool is not installed, however this one has it."""
    folder = home.path / "blocker"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}
