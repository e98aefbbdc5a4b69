"""What `phi3 flow image` writes: its own requirements in a clean environment, started and loaded.

No container is needed: the context is started with the command of its Dockerfile, as it lies.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from tests.integration.linked_venv import linked_venv, missing, pinned
from tests.integration.pf_home import Endpoint, endpoint, free_port
from tests.integration.stub_endpoint import OPENAI, SSE, Reply, StubEndpoint, chunk

from phi3_training.cli import main
from phi3_training.errors import UsageError
from phi3_training.flow.bundle import Context, write_image

pytest.importorskip("gunicorn", reason="gunicorn is not installed")

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "flows/phi3_chat"
KEY = "image-key-7d20+fa/91=="
READY_SECONDS = 60


@dataclass
class Served:
    """A started context."""

    url: str
    process: psutil.Popen
    log: Path
    home: Path

    def ask(self, question: str, **headers: str) -> requests.Response:
        body = {"input_data": question, "chat_history": []}
        return requests.post(f"{self.url}/score", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return write_image(FLOW, tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def python(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the emitted requirements alone, linked from this one."""
    names = [*pinned(context.folder / "requirements.txt")]
    if absent := missing(names):
        pytest.skip(f"not installed here: {', '.join(absent)}")
    return linked_venv(tmp_path_factory.mktemp("venv"), names)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Endpoint]:
    with endpoint(KEY) as state:
        yield state


def command(context: Context, python: Path) -> list[str]:
    """The start command of the Dockerfile, in this environment."""
    text = (context.folder / "Dockerfile").read_text(encoding="utf-8")
    start = json.loads(re.findall(r"^CMD (.+)$", text, re.M)[-1])
    assert tuple(start) == context.start
    return [str(python), "-m", *start]


class Starter:
    """Starts contexts in an environment of the container's own variables, on loopback."""

    def __init__(self, context: Context, python: Path, folder: Path) -> None:
        self._context, self._python, self._folder = context, python, folder
        self.started: list[psutil.Popen] = []

    def __call__(self, **variables: str) -> Served:
        home = self._folder / f"home{len(self.started)}"
        home.mkdir()
        port = free_port()
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PF_HOME_DIRECTORY": str(home / ".promptflow"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port}",
            "NO_PROXY": "*",
            **variables,
        }
        log = home.with_suffix(".log")
        with log.open("wb") as stream:
            process = psutil.Popen(
                command(self._context, self._python), cwd=self._context.folder, env=env,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            )  # fmt: skip
        self.started.append(process)
        return Served(f"http://127.0.0.1:{port}", process, log, home)

    def ready(self, **variables: str) -> Served:
        served = self(**variables)
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and served.process.poll() is None:
            try:
                if requests.get(f"{served.url}/health", timeout=5).ok:
                    return served
            except requests.ConnectionError:
                time.sleep(0.1)
        raise AssertionError(f"did not start:\n{served.log.read_text(errors='replace')}")

    def stop(self) -> None:
        for process in self.started:
            family = [process, *process.children(recursive=True)] if process.is_running() else []
            for one in family[:1]:
                one.terminate()
            for left in psutil.wait_procs(family, timeout=10)[1]:
                left.kill()


@pytest.fixture(scope="module")
def start(
    context: Context, python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Starter]:
    starter = Starter(context, python, tmp_path_factory.mktemp("started"))
    yield starter
    starter.stop()


@pytest.fixture(scope="module")
def served(start: Starter, upstream: Endpoint) -> Served:
    return start.ready(
        PHI3_ENDPOINT=upstream.url, PHI3_KEY=KEY, PF_LOGGING_LEVEL="DEBUG",
        PROMPTFLOW_WORKER_NUM="2",
    )  # fmt: skip


def test_environment_is_core_only(python: Path) -> None:
    code = "import promptflow.core, importlib.util as u; print([n for n in ('promptflow._sdk', "
    code += "'promptflow.azure', 'phi3_tool', 'phi3_training', 'keyring') if u.find_spec(n)])"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_answers_under_load_with_the_key_from_the_environment(served: Served) -> None:
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda n: served.ask(f"Question {n}"), range(64)))
    assert {reply.status_code for reply in replies} == {200}
    assert [r.json() for r in replies] == [{"answer": f"1: Question {n}"} for n in range(64)]


def test_workers_are_processes_and_the_page_works(served: Served) -> None:
    assert len(served.process.children()) == 2
    assert "/score" in requests.get(f"{served.url}/swagger.json", timeout=20).json()["paths"]
    page = requests.get(served.url, timeout=20)  # which `pf flow serve` answers with 400
    assert page.status_code == 200
    assert "<html" in page.text


def test_no_store_no_keyring_and_no_key_anywhere(served: Served, context: Context) -> None:
    """After requests at DEBUG: nothing was kept in its HOME, and the key is in no file of it."""
    assert served.ask("Hello?").ok
    kept = [path for path in served.home.rglob("*") if path.is_file()]
    assert not [path for path in kept if path.suffix in (".sqlite", ".cfg", ".db")]
    lying = [path for path in context.folder.rglob("*") if path.is_file()]
    for path in (*kept, *lying, served.log):
        assert KEY.encode() not in path.read_bytes(), path


def test_streams(start: Starter) -> None:
    pieces = tuple((0.0, chunk(text)) for text in ("one ", "two ", "three"))
    with StubEndpoint(Reply(headers=SSE, chunks=(*pieces, (0.0, b"data: [DONE]\n\n")))) as stub:
        served = start.ready(
            PHI3_ENDPOINT=stub.url(OPENAI), PHI3_KEY=KEY, PROMPTFLOW_WORKER_NUM="1"
        )
        reply = served.ask("Count.", Accept="text/event-stream")
    said = [json.loads(line[6:])["answer"] for line in reply.text.splitlines() if line]
    assert said == ["one ", "two ", "three"]
    assert reply.headers["Content-Type"].startswith("text/event-stream")


def test_wrong_key_is_reported_without_the_key(start: Starter, upstream: Endpoint) -> None:
    wrong = "another-key-33/x=="
    served = start.ready(
        PHI3_ENDPOINT=upstream.url, PHI3_KEY=wrong, PROMPTFLOW_WORKER_NUM="1",
        PF_LOGGING_LEVEL="ERROR",
    )  # fmt: skip
    reply = served.ask("Hello?")
    assert reply.status_code == 400
    assert "AuthenticationError" in reply.json()["error"]["message"]
    assert wrong not in reply.text
    assert wrong.encode() not in served.log.read_bytes()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "PHI3_ENDPOINT is not set"),
        ({"PHI3_ENDPOINT": "http://models.example/score", "PHI3_KEY": "k1"}, "plain http"),
    ],
)
def test_does_not_start_without_a_usable_endpoint(
    start: Starter, variables: dict[str, str], said: str
) -> None:
    served = start(**variables)
    assert served.process.wait(READY_SECONDS) == 1
    log = served.log.read_text(encoding="utf-8")
    assert said in log
    assert "docker run -e PHI3_ENDPOINT -e PHI3_KEY" in log
    assert "Traceback" not in log


def test_context_is_what_the_docs_say(context: Context) -> None:
    own = {"Dockerfile", "app.py", "gunicorn.conf.py", "requirements.txt"}
    flow = {name for name in context.files if name.startswith("flow/")}
    assert set(context.files) == own | flow
    assert {"flow/flow.dag.yaml", "flow/phi3_tool/chat.py", "flow/requirements.txt"} <= flow
    assert not [name for name in flow if "jsonl" in name or ".promptflow" in name]
    text = (context.folder / "Dockerfile").read_text(encoding="utf-8")
    assert text.splitlines()[3] == "FROM python:3.13-slim"
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.M)
    assert "@" not in text
    assert not re.search(r"^(ENV|ARG).*PHI3_KEY", text, re.M)


def test_pins_are_those_that_this_repository_tests(context: Context) -> None:
    tested = {n.lower(): v for n, v in pinned(ROOT / "constraints/local.txt").items()}
    pins = pinned(context.folder / "requirements.txt")
    assert {n: v for n, v in pins.items() if tested.get(n.lower()) != v} == {}


def test_command_and_its_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], context: Context
) -> None:
    words = ["flow", "image", str(FLOW), "--out", str(tmp_path), "-o", "json"]
    assert main([*words, "--base", "python:3.12-slim"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == list(context.files)
    assert "FROM python:3.12-slim" in (tmp_path / "phi3_chat-image/Dockerfile").read_text()
    assert main(words) == 0  # over its own
    capsys.readouterr()
    assert main([*words, "--base", "a b"]) == 2
    mine = tmp_path / "mine/phi3_chat-image"
    mine.mkdir(parents=True)
    with pytest.raises(UsageError, match="is not an image"):
        write_image(FLOW, tmp_path / "mine")
