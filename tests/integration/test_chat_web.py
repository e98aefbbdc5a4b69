"""`phi3 chat --web` in a real browser: conversations, long answers, and readable errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.integration.chat_page import ask
from tests.integration.pf_home import ROOT, PfHome, listening, pf_home

from phi3_tool import ConnectionSettings
from phi3_training.errors import StageError
from phi3_training.flow.page import chat_page
from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, sync

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")
pytestmark = pytest.mark.browser
pytest_plugins = ("tests.integration.browser_plugin",)

KEY = "web-test-key-5c/11+aa"
LONG = "\n\n".join(
    f"{number}. The Mossback tent, size {number}, weighs {number + 2} kilograms and is pitched in "
    f"{number * 3} minutes; wash it by hand and dry it in the shade."
    for number in range(1, 41)
)
PATH = "/v1/chat/completions"


@dataclass
class Streaming:
    """A stand-in for the local endpoint: OpenAI's dialect, streamed, with a key."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    seen_first: threading.Event = field(default_factory=threading.Event)  # words of LONG

    def answer(self, messages: list[dict[str, str]]) -> str:
        question = messages[-1]["content"]
        if "passages below" in question:
            return "It costs 30 dollars [1]; a canoe costs more [2]."
        return LONG if "everything" in question else f"{len(messages)}: {question}"


def _handler(state: Streaming) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                self._head(401, "application/json")
                self.wfile.write(b'{"message": "the key is not valid"}')
                return
            state.bodies.append(body)
            text = state.answer(body["messages"])
            if not body.get("stream"):
                self._head(200, "application/json")
                self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())
                return
            self._head(200, "text/event-stream")
            for start in range(0, len(text), 200):
                if text == LONG and start:
                    state.seen_first.wait(240)
                piece = {"choices": [{"delta": {"content": text[start : start + 200]}}]}
                self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def _head(self, status: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            pass

    return Handler


@contextmanager
def streaming(port: int = 0) -> Iterator[Streaming]:
    state = Streaming()
    with listening(_handler(state), port) as taken:
        state.url = f"http://127.0.0.1:{taken}{PATH}"
        yield state


def browser(home: PfHome) -> Path:
    """A "browser" that appends its address to a file."""
    program = home.path / "browser.sh"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1" >> "{home.path}/shown.txt"\n')
    program.chmod(0o700)
    return program


@contextmanager
def chat_web(home: PfHome, url: str, key: str, *options: str) -> Iterator[tuple[str, Any]]:
    """`phi3 chat --web` as it is typed; the address it prints, its process. No URL: a run's."""
    command = [sys.executable, "-m", "phi3_training.cli", "chat", "--web"]
    env = {**home.env, "PYTHONUNBUFFERED": "1"}
    env |= {"PHI3_ENDPOINT": url, "PHI3_KEY": key} if url else {}
    # A desktop whose browser writes down what it is to show.
    env |= {"DISPLAY": ":0", "BROWSER": f"{browser(home)} %s"}
    said: list[str] = []
    with subprocess.Popen(
        [*command, *options], env=env, cwd=ROOT, text=True, bufsize=1,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("Chat page: "):
                    break
            assert said, "it said nothing"
            assert said[-1].startswith("Chat page: "), "".join(said)
            yield said[-1].partition(": ")[2].strip(), process
        finally:
            process.send_signal(signal.SIGINT)
            said.append(process.stdout.read())
            process.wait(30)
            home.printed.append("".join(said))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PfHome]:
    with pf_home(tmp_path_factory.mktemp("web") / "home") as state:
        yield state


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], None]:
    folder = Path(os.environ.get("PHI3_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))

    def take(page: Any, name: str) -> None:
        path = folder / f"web_{name}.png"
        page.screenshot(path=path)
        assert path.stat().st_size > 10_000

    return take


def seen(page: Any, text: str) -> None:
    page.get_by_text(text).filter(visible=True).last.wait_for(timeout=240_000)


def started_in(temporary: Path) -> list[psutil.Process]:
    """Processes whose Prompt flow home lies below this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PF_HOME_DIRECTORY", "").startswith(str(temporary)):
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def test_conversation_and_long_answer(
    page: Any, home: PfHome, pictures: Callable[[Any, str], None]
) -> None:
    temporary = Path(home.env["TMPDIR"])
    options = ("--system", "You sell tents.", "--max-new-tokens", "99")
    with streaming() as served, chat_web(home, served.url, KEY, *options) as (address, process):
        page.goto(address)
        ask(page, "Who founded Contoso?")
        seen(page, "2: Who founded Contoso?")
        ask(page, "And when?")
        seen(page, "4: And when?")
        pictures(page, "conversation")
        roles = [message["role"] for message in served.bodies[-1]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
        assert served.bodies[-1]["max_tokens"] == 99
        assert served.bodies[-1]["stream"] is True

        ask(page, "Tell me everything.")  # its first words are there before the last are made
        seen(page, "The Mossback tent, size 1,")
        assert page.get_by_text("The Mossback tent, size 40").count() == 0
        served.seen_first.set()
        seen(page, "The Mossback tent, size 40")
        pictures(page, "long_answer")
        assert started_in(temporary)
    assert (home.path / "shown.txt").read_text() == f"{address}\n"
    assert process.returncode == 0
    assert started_in(temporary) == []
    assert list(temporary.glob("phi3-chat-*")) == []
    assert "Closed" in home.printed[-1]
    assert KEY not in home.printed[-1]


@pytest.mark.slow
def test_answers_from_documents_name_their_sources(
    page: Any, home: PfHome, pictures: Callable[[Any, str], None]
) -> None:
    runs = home.path / "rag-runs"
    handbook = ROOT / "training/data/handbook"
    documents = [handbook / "kayak-rental.docx", *handbook.glob("*.md")]
    sync(runs / "documents/rag/index.sqlite", documents, Chosen(None, {}, ""), no_progress)
    options = ("--rag", "--runs", str(runs), "--no-browser")
    with streaming() as served, chat_web(home, served.url, KEY, *options) as (address, _):
        page.goto(address)
        ask(page, "How much is the kayak rental for a day?")
        seen(page, "kayak-rental.docx (Kayak rental)")
        seen(page, "kayak-rental.docx (Kayak rental | Prices)")
        pictures(page, "sources")
        ask(page, "Who painted the ceiling in Rome?")
        seen(page, "That is not in the documents.")
        assert len(served.bodies) == 1


@pytest.mark.slow
def test_wrong_key_and_endpoint_down(
    page: Any, home: PfHome, pictures: Callable[[Any, str], None]
) -> None:
    wrong = "wrong-key-77/b1"
    with ExitStack() as stack:
        served = stack.enter_context(streaming())
        with chat_web(home, served.url, wrong, "--no-browser") as (address, process):
            shown = home.path / "shown.txt"
            assert not shown.exists() or address not in shown.read_text()
            page.goto(address)
            ask(page, "May I come in?")
            seen(page, "does not accept the key")
            pictures(page, "wrong_key")
            assert wrong not in page.content()

            stack.close()
            ask(page, "Is anybody there?")
            seen(page, "start the local endpoint with")
            pictures(page, "endpoint_down")
            assert page.get_by_text("Failed to fetch").count() == 0
            process.terminate()  # as a session manager does
            assert process.wait(30) == 0
    assert started_in(Path(home.env["TMPDIR"])) == []


@pytest.mark.slow
@pytest.mark.parametrize("busy", [0, 4], ids=["quiet", "loaded"])
def test_thirty_conversations_of_three_turns(page: Any, home: PfHome, busy: int) -> None:
    """Ten starts, three visits each: the page died in two of three, after the first answer."""
    burn = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as stack:
        for _ in range(busy):
            stack.callback(subprocess.Popen(burn).kill)
        for _ in range(10):
            with (
                streaming() as served,
                chat_web(home, served.url, KEY, "--no-browser") as (address, process),
            ):
                for visit in range(3):
                    page.goto(address)
                    for turn in range(3):
                        ask(page, f"Visit {visit}, turn {turn}?")
                        seen(page, f": Visit {visit}, turn {turn}?")
                assert process.poll() is None


STORED_RUN = """
import sys
from pathlib import Path
from phi3_training.flow.store import connect
from phi3_training.manifests import EndpointManifest
from phi3_training.run import Run
folder, endpoint, pid, create_time = sys.argv[1:]
run = Run.open(Path(folder))
deployed = EndpointManifest(
    endpoint=endpoint, engine="stub", pid=int(pid), create_time=float(create_time)
)
run.write(deployed)
run.write(connect(deployed, sys.stdin.read()))
"""


@pytest.mark.slow
def test_the_connection_of_a_stored_run(page: Any, home: PfHome) -> None:
    """Endpoint and key out of the run's connection, as after `phi3 up`; the store is left alone."""
    runs = home.path / "runs"
    runs.mkdir()
    # A run's server is known by its process, command line included: here one that only waits.
    waiting = [sys.executable, "-c", "input()", "phi3_training.serve"]
    with streaming() as served, psutil.Popen(waiting, stdin=subprocess.PIPE) as server:
        endpoint = served.url.replace(PATH, "/score")
        stored = [str(runs / "mine"), endpoint, str(server.pid), repr(server.create_time())]
        done = home.python(STORED_RUN, *stored, feed=KEY)
        assert done.code == 0, done.text
        before = (home.pf_dir / "pf.sqlite").read_bytes()
        with chat_web(home, "", "", "--runs", str(runs)) as (address, _process):
            page.goto(address)
            ask(page, "Who asks?")
            seen(page, "1: Who asks?")
        server.communicate(b"\n")
        assert served.bodies[-1]["stream"] is True
    assert (home.pf_dir / "pf.sqlite").read_bytes() == before
    assert KEY not in home.printed[-1]


def test_filelock_that_kills_the_page() -> None:
    settings = ConnectionSettings.from_connection(
        {"endpoint": "http://127.0.0.1:1/score", "key": "k"}
    )
    flow = ROOT / "flows/phi3_chat"
    versions = {"filelock": "3.30.1"}
    with (
        pytest.raises(StageError, match=r"filelock>=3.20,<3.30"),
        chat_page(flow, settings, {}, versions.get),
    ):
        pass


def test_an_input_that_the_flow_does_not_have() -> None:
    settings = ConnectionSettings.from_connection(
        {"endpoint": "http://127.0.0.1:1/score", "key": "k"}
    )
    with (
        pytest.raises(StageError, match="no input 'colour'"),
        chat_page(ROOT / "flows/phi3_chat", settings, {"colour": "red"}),
    ):
        pass
