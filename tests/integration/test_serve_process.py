"""The endpoint as a process of its own: start, outlive the parent, drain, stop exactly that one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import requests
from tests.integration.misbehaving import delayed
from tests.integration.server_fixture import AUTH, KEY, PAIRS, Served, Taught, score_body, served

from phi3_training.engine import choose_engine
from phi3_training.errors import StageError
from phi3_training.serve import process
from phi3_training.serve.config import ServerConfig
from phi3_training.serve.engines.base import Engine

pytest_plugins = ("tests.integration.server_plugin",)


def config(taught: Taught, **settings: object) -> ServerConfig:
    folders = {"model_dir": taught.model_dir, "onnx_dir": taught.onnx_dir}
    return ServerConfig(engine="onnxruntime", **folders, **settings)  # type: ignore[arg-type]


def test_start_answers_and_stop_ends_it(
    taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3_KEY", "the-parents-own-key")
    log = tmp_path / "endpoint" / "server.log"
    server = process.start(config(taught), key=KEY, log_path=log)
    try:
        assert server.endpoint == f"http://127.0.0.1:{server.port}/score"
        assert process.alive(server.pid, server.create_time)
        answer = requests.post(
            server.endpoint, json=score_body(PAIRS[0][0]), headers=AUTH, timeout=10
        )
        assert answer.json() == {"output": PAIRS[0][1]}
        maps = [entry.path for entry in psutil.Process(server.pid).memory_maps()]
        assert not [path for path in maps if "/torch/" in path], "torch was loaded for nothing"
        _assert_no_key(server, log)
        if os.name == "posix":
            assert log.stat().st_mode & 0o777 == 0o600
            assert os.getsid(server.pid) == server.pid, "closing the terminal would end it"
    finally:
        assert process.stop(server.pid, server.create_time)
    assert not process.alive(server.pid, server.create_time)
    assert not process.stop(server.pid, server.create_time)
    assert not psutil.pid_exists(server.pid), "its end was not collected"
    assert "stopped" in log.read_text()


def _assert_no_key(server: process.Started, log: Path) -> None:
    child = psutil.Process(server.pid)
    assert KEY not in " ".join(child.cmdline())
    assert KEY not in str(child.environ())
    assert "the-parents-own-key" not in str(child.environ())
    for file in log.parent.iterdir():
        assert KEY not in file.read_text()
        assert PAIRS[0][0] not in file.read_text()


def test_the_log_names_engine_and_reason(taught: Taught, tmp_path: Path) -> None:
    settings = config(taught).model_copy(update={"engine": "auto"})
    log = tmp_path / "server.log"
    server = process.start(settings, key=KEY, log_path=log)
    process.stop(server.pid, server.create_time)
    name, reason = choose_engine("auto")
    told = log.read_text()
    assert f"engine {name}: {reason}" in told
    assert f"at {server.endpoint} and" in told
    assert "uvicorn" not in told, "good news under the name uvicorn.error"


def test_another_process_with_that_pid_is_left_alone() -> None:
    created = psutil.Process().create_time()
    assert not process.alive(os.getpid(), created)
    assert not process.stop(os.getpid(), created)
    assert not process.stop(os.getpid(), created - 100)


def test_a_server_that_cannot_start_says_why(taught: Taught, tmp_path: Path) -> None:
    started = time.monotonic()
    wrong = config(taught, num_threads=1).model_copy(update={"onnx_dir": tmp_path})
    with pytest.raises(StageError, match="not a converted model"):
        process.start(wrong, key=KEY, log_path=tmp_path / "server.log")
    assert time.monotonic() - started < 20


def test_a_taken_port_is_one_clear_line(taught: Taught, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = tmp_path / "settings.json"
        settings.write_text(config(taught, port=port).to_json())
        command = [sys.executable, "-m", "phi3_training.serve", "--config", str(settings)]
        done = subprocess.run(
            command,
            env={**os.environ, "PHI3_KEY": KEY, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr.strip().splitlines() == [
            f"error: Port {port} on 127.0.0.1 cannot be used (Address already in use); "
            "choose another with serve.port=PORT, or 0 for any free port"
        ]


def test_no_key_no_server(taught: Taught, tmp_path: Path) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(config(taught).to_json())
    done = subprocess.run(
        [sys.executable, "-m", "phi3_training.serve", "--config", str(settings)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "PHI3_KEY" in done.stderr


def test_it_outlives_the_process_that_started_it(taught: Taught, tmp_path: Path) -> None:
    parent = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from phi3_training.serve import process\n"
        "from phi3_training.serve.config import ServerConfig\n"
        "config = ServerConfig.model_validate_json(sys.argv[1])\n"
        "s = process.start(config, key=sys.stdin.readline().strip(), log_path=Path(sys.argv[2]))\n"
        "print(json.dumps([s.pid, s.create_time, s.endpoint]))\n"
    )
    arguments = [config(taught).to_json(), str(tmp_path / "server.log")]
    done = subprocess.run(
        [sys.executable, "-c", parent, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        input=KEY + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    pid, created, endpoint = json.loads(done.stdout)
    try:
        answer = requests.post(endpoint, json=score_body(PAIRS[1][0]), headers=AUTH, timeout=10)
        assert answer.json() == {"output": PAIRS[1][1]}
    finally:
        assert process.stop(pid, created)


def _wait_for_a_request(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        connections = psutil.Process(pid).net_connections("tcp")
        if any(c.status == psutil.CONN_ESTABLISHED for c in connections):
            time.sleep(0.3)  # connected; now let the request arrive
            return
        time.sleep(0.02)


def _in_front_of(slow: Served, folder: Path, *, drain_seconds: int) -> process.Started:
    """A server process whose answers take as long as those of the other endpoint."""
    settings = ServerConfig(
        engine="upstream", upstream_url=slow.url + "/v1", drain_seconds=drain_seconds
    )
    return process.start(settings, key=KEY, log_path=folder / "server.log", upstream_key=KEY)


def test_sigterm_finishes_what_is_running(engine: Engine, tmp_path: Path) -> None:
    with served(engine, inside=delayed(1)) as slow:
        server = _in_front_of(slow, tmp_path, drain_seconds=10)
        answers: list[requests.Response] = []

        def ask() -> None:
            body = score_body(PAIRS[2][0])
            answers.append(requests.post(server.endpoint, json=body, headers=AUTH, timeout=20))

        thread = threading.Thread(target=ask)
        thread.start()
        _wait_for_a_request(server.pid)
        os.kill(server.pid, signal.SIGTERM)
        thread.join(20)
        assert [answer.json() for answer in answers] == [{"output": PAIRS[2][1]}]
        psutil.wait_procs([psutil.Process(server.pid)], timeout=10)
        assert not process.alive(server.pid, server.create_time)
        process.stop(server.pid, server.create_time)


def test_the_drain_has_an_end(engine: Engine, tmp_path: Path) -> None:
    with served(engine, inside=delayed(60)) as slow:
        server = _in_front_of(slow, tmp_path, drain_seconds=1)
        ends: list[str] = []

        def ask() -> None:
            try:
                body = score_body(PAIRS[2][0])
                answer = requests.post(server.endpoint, json=body, headers=AUTH, timeout=30)
                ends.append(str(answer.status_code))
            except requests.RequestException as error:
                ends.append(type(error).__name__)

        thread = threading.Thread(target=ask)
        thread.start()
        _wait_for_a_request(server.pid)
        started = time.monotonic()
        assert process.stop(server.pid, server.create_time)
        assert time.monotonic() - started < 15
        thread.join(20)
        assert ends in (["500"], ["ConnectionError"])
