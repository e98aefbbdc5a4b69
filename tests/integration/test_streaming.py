"""Tokens reach the person as they come: in `--interactive` and from the served flow.

The endpoint holds back the rest of an answer until its first piece was seen at the far end.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.integration.pf_home import PF, PfHome, Process, free_port, interrupt, pf_home
from tests.integration.streaming_endpoint import PIECES, WHOLE, Answering
from tests.integration.stub_endpoint import StubEndpoint

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")

KEY = "stream-test-key-71"
SSE_ONLY = {"Accept": "text/event-stream"}
AS_CHAT_PAGE = {"Accept": "text/event-stream, application/json"}
QUESTIONS = ("Who founded it?", "Do you fail in the middle?", "And then?")
CONNECT = """
import sys
from phi3_training.flow.store import connect
from phi3_training.manifests import EndpointManifest
endpoint = EndpointManifest(endpoint=sys.argv[1], dialect="score")
connect(endpoint, sys.stdin.read(), dialect="openai")
"""


@pytest.fixture(scope="module")
def answering() -> Answering:
    return Answering()


@pytest.fixture(scope="module")
def stub(answering: Answering) -> Iterator[StubEndpoint]:
    with StubEndpoint(script=answering) as state:
        yield state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, stub: StubEndpoint) -> Iterator[PfHome]:
    """Its connection is made as `phi3 connect connection.dialect=openai` makes it."""
    with pf_home(tmp_path_factory.mktemp("stream") / "home") as state:
        done = state.python(CONNECT, stub.url("/score"), feed=KEY)
        assert done.code == 0, done.text
        yield state


@pytest.fixture(scope="module")
def flow(home: PfHome) -> Path:
    return home.copy_flow()


@pytest.mark.parametrize("no_traces", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_the_terminal_shows_each_piece_and_remembers_the_whole(
    home: PfHome, flow: Path, stub: StubEndpoint, answering: Answering, no_traces: str
) -> None:
    env = {**home.env, "PF_DISABLE_TRACING": no_traces, "PYTHONUNBUFFERED": "1"}
    command = [PF, "flow", "test", "--flow", flow, "--interactive"]
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None
        try:
            process.stdin.write("".join(f"{question}\n" for question in QUESTIONS).encode())
            process.stdin.close()
            screen = Screen(process)
            for question in QUESTIONS:
                screen.wait_for(f"Bot: {PIECES[0]}")
                if "fail" in question:
                    screen.wait_for("the GPU is out of memory")
                    continue
                answering.seen_first.set()  # only now is the rest sent
                screen.wait_for(PIECES[-1])
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert answering.given_up == 0, "the first piece was shown with the last"
    last = json.loads(stub.seen[-1].body)
    assert last["stream"] is True
    whole = "".join(PIECES)
    answers = [whole, PIECES[0], whole]  # without the note that the second one broke off
    said = [text for turn in zip(QUESTIONS, answers, strict=True) for text in turn]
    assert [message["content"] for message in last["messages"]] == said[:-1]
    kept = json.loads((flow / ".promptflow/chat.output.json").read_text(encoding="utf-8"))
    assert kept == {"answer": "".join(PIECES)}


class Screen:
    """What a process has printed, read up to certain words at a time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._handle = process.stdout.fileno()
        self._unread = b""

    def wait_for(self, words: str) -> None:
        while words.encode() not in self._unread:
            more = os.read(self._handle, 4096)
            assert more, f"ended after {self._unread.decode()!r}, without {words!r}"
            self._unread += more
        self._unread = self._unread.partition(words.encode())[2]


@contextmanager
def serving(home: PfHome, flow: Path, engine: str, **env: str) -> Iterator[int]:
    """The port of `pf flow serve`."""
    port = free_port()
    command: list[str | Path] = [PF, "flow", "serve", "--source", flow, "--engine", engine]
    command += ["--port", str(port), "--host", "127.0.0.1", "--skip-open-browser"]
    log = home.path / f"serve-{engine}.log"
    with log.open("wb") as stream:
        process = home.start(command, env=env, log=stream)
        try:
            wait_for(process, port, log)
            yield port
        finally:
            interrupt(process)


def wait_for(process: Process, port: int, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text(encoding="utf-8", errors="replace"))


@pytest.fixture(scope="module", params=["fastapi", "flask"])
def port(request: pytest.FixtureRequest, home: PfHome, flow: Path) -> Iterator[int]:
    with serving(home, flow, request.param) as state:
        yield state


@contextmanager
def asked(port: int, question: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = json.dumps({"input_data": question})
        connection.request("POST", "/score", body, {"Content-Type": "application/json", **headers})
        yield connection.getresponse()
    finally:
        connection.close()


def event(response: http.client.HTTPResponse) -> str:
    line = response.readline()
    assert response.readline() == b"\n", line
    answer = json.loads(line.removeprefix(b"data: "))["answer"]
    assert isinstance(answer, str)
    return answer


@pytest.mark.parametrize("headers", [SSE_ONLY, AS_CHAT_PAGE])
def test_the_served_flow_hands_each_piece_on(
    port: int, answering: Answering, headers: dict[str, str]
) -> None:
    with asked(port, "Who founded it?", **headers) as response:
        assert (response.status, response.headers.get_content_type()) == (200, "text/event-stream")
        pieces = [event(response)]
        answering.seen_first.set()
        pieces += [event(response) for _ in PIECES[1:]]
        assert response.read() == b""
    assert pieces == list(PIECES)
    assert answering.given_up == 0


def test_who_asks_for_json_gets_the_whole_answer(port: int, stub: StubEndpoint) -> None:
    for headers in ({}, {"Accept": "application/json"}):
        with asked(port, "Who founded it?", **headers) as response:
            assert (response.status, json.load(response)) == (200, {"answer": WHOLE})
        assert "stream" not in json.loads(stub.seen[-1].body)


@pytest.mark.parametrize("headers", [SSE_ONLY, {}])
def test_a_refusal_is_reported_before_anything_streams(port: int, headers: dict[str, str]) -> None:
    with asked(port, "Is my key right?", **headers) as response:
        error = json.load(response)["error"]
        assert (response.status, error["code"]) == (400, "UserError")
    for part in ("AuthenticationError", "status 401", "no such key", "phi3 connect", "request id"):
        assert part in error["message"]
    assert "Traceback" not in error["message"]
    assert KEY not in error["message"]


def test_a_stream_that_fails_at_once_is_no_answer(port: int) -> None:
    with asked(port, "Do you fail at once?", **SSE_ONLY) as response:
        assert response.status == 400
        assert "the GPU is out of memory" in json.load(response)["error"]["message"]


def test_a_stream_that_breaks_off_says_so(port: int) -> None:
    """Its status is long sent: the text is the one place left to say it."""
    with asked(port, "Do you fail in the middle?", **SSE_ONLY) as response:
        assert response.status == 200
        assert event(response) == PIECES[0]
        last = event(response)
        assert response.read() == b""  # ended in good order, or the chat page would drop it all
    assert "[The answer was cut off." in last
    assert "the GPU is out of memory" in last


def test_an_endpoint_that_does_not_stream_answers_at_once(
    home: PfHome, flow: Path, stub: StubEndpoint
) -> None:
    """The same flow folder and /score: one event with everything for who accepts nothing else."""
    env = {"PHI3_CONNECTION_ENDPOINT": stub.url("/score")}
    with serving(home, flow, "fastapi", **env) as port:
        for headers in (SSE_ONLY, AS_CHAT_PAGE):
            with asked(port, "Who founded it?", **headers) as response:
                assert response.status == 200
                assert event(response) == WHOLE
                assert response.read() == b""
        with asked(port, "Who founded it?") as response:
            assert json.load(response) == {"answer": WHOLE}
        with asked(port, "Is my key right?", **SSE_ONLY) as response:
            assert response.status == 400
            assert "status 401" in json.load(response)["error"]["message"]
    assert stub.seen[-1].path == "/score"


@pytest.mark.slow
def test_a_test_and_a_batch_hold_plain_text(home: PfHome, flow: Path) -> None:
    """One line fails: its error is ours, with status and fix, and no key."""
    done = home.pf("flow", "test", "--flow", flow, "--inputs", "input_data=Who founded it?")
    assert done.code == 0, done.text
    assert json.loads(done.out[done.out.index("\n{") :]) == {"answer": WHOLE}
    data = home.path / "lines.jsonl"
    data.write_text('{"q": "Who founded it?"}\n{"q": "Is my key right?"}\n', encoding="utf-8")
    create = ["run", "create", "--flow", flow, "--data", data, "--name", "streams"]
    done = home.pf(*create, "--column-mapping", "input_data=${data.q}")
    assert done.code == 0, done.text
    folder = home.pf_dir / ".runs/streams"
    (row,) = map(json.loads, (folder / "flow_outputs/output.jsonl").read_text().splitlines())
    assert row == {"line_number": 0, "answer": WHOLE}
    told = (folder / "error.json").read_text(encoding="utf-8")
    (failed,) = json.loads(told)["additionalInfo"][0]["info"]["errors"]
    assert failed["line_number"] == 1
    for part in ("AuthenticationError", "status 401", "no such key", "phi3 connect"):
        assert part in failed["error"]["message"]
    assert "client.py" not in told  # the trace ends where the tool raised it
    assert KEY not in told
