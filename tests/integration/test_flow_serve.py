"""`phi3 flow serve`: Prompt flow's server, both engines, from the environment alone."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from tests.integration.pf_home import (
    Endpoint,
    PfHome,
    Process,
    endpoint,
    free_port,
    interrupt,
    pf_home,
)

from phi3_training.cli import main
from phi3_training.flow.server import leave_traces_out

pytest.importorskip("promptflow._sdk", reason="the extra `flow` is not installed")
pytest_plugins = ("tests.integration.browser_plugin",)

PF = str(Path(sys.executable).with_name("pf"))
KEY = "serve-key-18ac/+7=="
# No keyring that works, as in a container.
NO_KEYRING = {"PYTHON_KEYRING_BACKEND": "keyring.backends.fail.Keyring"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PfHome]:
    with pf_home(tmp_path_factory.mktemp("serve") / "home") as state:
        yield state


@pytest.fixture(scope="module")
def flow(home: PfHome) -> Path:
    return home.copy_flow()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Endpoint]:
    with endpoint(KEY) as state:
        yield state


@pytest.fixture(scope="module", params=[pytest.param("flask", marks=pytest.mark.slow), "fastapi"])
def served(home: PfHome, upstream: Endpoint, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of `phi3 flow serve`, without store and keyring."""
    port = free_port()
    log = home.path / f"{request.param}.log"
    command = [sys.executable, "-m", "phi3_training.cli", "flow", "serve"]
    env = {**NO_KEYRING, "PHI3_ENDPOINT": upstream.url, "PHI3_KEY": KEY}
    with log.open("wb") as stream:
        started = [*command, "--engine", request.param, "--port", str(port)]
        process = home.start(started, env=env, cwd=home.path, log=stream)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield url
    finally:
        interrupt(process)


def test_serves_without_store_and_keyring(home: PfHome, served: str) -> None:
    body = {"input_data": "Hello there?", "chat_history": []}
    replies = [requests.post(f"{served}/score", json=body, timeout=60) for _ in range(3)]
    assert [r.json() for r in replies] == [{"answer": "1: Hello there?"}] * 3
    null = requests.post(f"{served}/score", json={**body, "temperature": None}, timeout=60)
    assert null.json() == {"answer": "1: Hello there?"}  # null is the default
    assert requests.get(served, timeout=20).status_code == 200  # the page, on either engine
    shape = requests.get(f"{served}/swagger.json", timeout=20).json()["paths"]["/score"]["post"]
    schema = shape["requestBody"]["content"]["application/json"]["schema"]
    assert (sorted(schema["properties"]), schema["required"]) == (
        ["chat_history", "input_data"],  # what the page draws
        ["input_data"],
    )
    for sent in ({"question": "Hi?"}, {}, {"input_data": None}, [1]):
        refused = requests.post(f"{served}/score", json=sent, timeout=60)
        assert refused.status_code == 400, refused.text
        assert "input_data" in refused.json()["error"]["message"]
    files = [path for path in home.path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith("keyring")]
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
        assert b"phi3_connection" not in path.read_bytes() or path.suffix != ".sqlite", path


@pytest.mark.browser
def test_the_page_works_with_the_question_alone(page: Any, served: str, tmp_path: Path) -> None:
    """Prompt flow's page draws a required field for every input that swagger.json describes."""
    page.goto(served)
    fields = page.locator("input[aria-required=true], textarea[aria-required=true]")
    fields.first.wait_for(timeout=240_000)
    assert fields.count() == 1
    page.get_by_text("phi3_chat(").wait_for(timeout=240_000)  # its name, not a temporary folder's
    for question, seen in (("Who made it?", "1: Who made it?"), ("And when?", "3: And when?")):
        fields.first.fill(question)
        fields.first.press("Enter")  # what Send does, where it is not grey
        page.get_by_text(seen).filter(visible=True).last.wait_for(timeout=240_000)
    picture = Path(os.environ.get("PHI3_SCREENSHOT", tmp_path / "served_page.png"))
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000


def test_workers_share_one_port_and_end_together(home: PfHome, upstream: Endpoint) -> None:
    port = free_port()
    log = home.path / "workers.log"
    command = [sys.executable, "-m", "phi3_training.cli", "flow", "serve", "--workers", "2"]
    env = {**NO_KEYRING, "PHI3_ENDPOINT": upstream.url, "PHI3_KEY": KEY}
    with log.open("wb") as stream:
        process = home.start([*command, "--port", str(port)], env=env, cwd=home.path, log=stream)
    started: list[psutil.Process] = []
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        started = psutil.Process(process.pid).children(recursive=True)
        workers = [one for one in started if "spawn_main" in " ".join(one.cmdline())]
        assert len(workers) == 2
        asked = [{"input_data": f"Hello {n}?", "chat_history": []} for n in range(8)]
        replies = [requests.post(f"{url}/score", json=body, timeout=60).json() for body in asked]
        assert replies == [{"answer": f"1: Hello {n}?"} for n in range(8)]
    finally:
        interrupt(process)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    said = log.read_text(errors="replace")
    assert "Traceback" not in said
    assert KEY not in said


@pytest.mark.parametrize("engine", ["flask", "fastapi"])
def test_a_port_in_use_is_reported_before_the_flow_is_loaded(
    upstream: Endpoint,
    flow: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
) -> None:
    monkeypatch.setenv("PHI3_ENDPOINT", upstream.url)
    monkeypatch.setenv("PHI3_KEY", KEY)
    taken = upstream.url.partition("://")[2].partition("/")[0].rpartition(":")[2]
    assert main(["flow", "serve", str(flow), "--engine", engine, "--port", taken]) == 1
    assert f"127.0.0.1:{taken}" in (said := capsys.readouterr().err)
    assert "another --port" in said


def test_flask_has_one_process(capsys: pytest.CaptureFixture[str], flow: Path) -> None:
    command = ["flow", "serve", str(flow), "--engine", "flask", "--workers", "2"]
    assert main(command) == 2
    assert "--engine fastapi" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["", pytest.param("INFO", marks=pytest.mark.slow)])
def test_prompt_flows_own_server_logs_errors_unless_asked_for_more(
    home: PfHome, flow: Path, upstream: Endpoint, level: str
) -> None:
    home.connect(upstream.url, KEY)
    port = free_port()
    log = home.path / f"pf-{level}.log"
    command = [PF, "flow", "serve", "--source", str(flow), "--port", str(port)]
    with log.open("wb") as stream:
        process = home.start(
            [*command, "--skip-open-browser"],
            env={"PF_LOGGING_LEVEL": level},
            cwd=home.path,
            log=stream,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        body = {"input_data": "Hello planted question?", "chat_history": []}
        assert requests.post(f"{url}/score", json=body, timeout=60).status_code == 200
        broken = requests.post(f"{url}/score", json={"input_data": ""}, timeout=60)
        assert broken.status_code == 400
    finally:
        interrupt(process)
    said = log.read_text(errors="replace")
    assert "planted question" not in said
    assert ("Executing node" in said) == bool(level), said
    assert "The question is empty" in said  # faults are told either way


def _wait(url: str, process: Process, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_flow_that_cannot_be_loaded_is_reported_once(
    home: PfHome, flow: Path, upstream: Endpoint, workers: str
) -> None:
    broken = flow.with_name("broken")
    shutil.copytree(flow, broken, dirs_exist_ok=True)
    (broken / "integrate_with_promptflow.py").write_text("def broken(:\n")
    command = [sys.executable, "-m", "phi3_training.cli", "flow", "serve", str(broken)]
    done = home.run(
        [*command, "--port", str(free_port()), "--workers", workers],
        env={"PHI3_ENDPOINT": upstream.url, "PHI3_KEY": KEY},
        cwd=home.path,
        timeout=120,
    )
    assert done.code == 1
    assert "cannot be served" in done.err
    assert "integrate_with_promptflow.py" in done.err
    assert "Traceback" not in done.text


@pytest.mark.parametrize("collector", ["", "http://127.0.0.1:4318"])
def test_requests_are_traced_for_who_collects_traces(
    monkeypatch: pytest.MonkeyPatch, collector: str
) -> None:
    """Prompt flow traces where it can import the instrumentation."""
    names = [f"opentelemetry.instrumentation.{engine}" for engine in ("flask", "fastapi")]
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    for name in names:
        sys.modules.pop(name, None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
    leave_traces_out()
    assert [name in sys.modules for name in names] == [not collector] * 2


def test_says_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["flow", "serve"]) == 2
    said = capsys.readouterr().err
    assert "PHI3_ENDPOINT is not set" in said
    assert "PHI3_KEY is not set" in said
    assert main(["flow", "serve", str(tmp_path)]) == 2
    assert "is not a flow" in capsys.readouterr().err
