"""Every command of `pf` and `phi3` around the flow, with a planted key, at DEBUG: it leaks nowhere.

One HOME holds it all: store, runs, traces, logs, a clone with its flows, builds, zips, answers.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from tests.integration.leaks import KEY, WRONG_KEY, everything, files_below, leaks
from tests.integration.pf_home import (
    PF,
    ROOT,
    PfHome,
    endpoint,
    free_port,
    interrupt,
    pf_home,
)

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")

# Marks of what people say and hear: unlike the key they may be stored, but not be logged.
QUESTION = "Quokka-question-4711?"
TRACES = "telemetry:\n  enabled: false\ntrace:\n  destination: local\n"
READY_SECONDS = 240


@contextmanager
def started(home: PfHome, *command: str | Path, env: Mapping[str, str], log: str) -> Iterator[Path]:
    """A command that stays, its output in a file of this HOME. A variable set to "" is left out."""
    path = home.path / log
    merged = {name: value for name, value in {**home.env, **env}.items() if value}
    with path.open("wb") as stream:
        process = subprocess.Popen(
            [str(part) for part in command], env=merged, cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
        )  # fmt: skip
        try:
            yield path
        finally:
            interrupt(process)


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer:\n{log.read_text(errors='replace')}")


def ask_over_http(home: PfHome, port: int) -> int:
    """Ask a served flow; what it answers is output like any other."""
    answer = requests.post(
        f"http://127.0.0.1:{port}/score",
        json={"input_data": QUESTION, "chat_history": []},
        timeout=60,
    )
    home.printed.append(answer.text + str(answer.headers))
    return answer.status_code


def serve(
    home: PfHome, *command: str | Path, engine: str, env: Mapping[str, str], status: int, log: str
) -> None:
    """Serve the flow, ask it once, stop it."""
    port = free_port()
    options = ["--engine", engine, "--host", "127.0.0.1", "--port", str(port)]
    with started(home, *command, *options, env=env, log=log) as path:
        wait_for(f"http://127.0.0.1:{port}/health", path)
        assert ask_over_http(home, port) == status


def chat_web(home: PfHome, env: Mapping[str, str], during: dict[str, bytes]) -> None:
    """The page's service, asked as the page asks it; its own files are looked at while it runs."""
    command = [sys.executable, "-m", "phi3_training.cli", "chat", "--web", "--no-browser"]
    with started(home, *command, env={**env, "PYTHONUNBUFFERED": "1"}, log="web.log") as path:
        deadline = time.monotonic() + READY_SECONDS
        while not (found := re.search(r"Chat page: (\S+)", path.read_text())):
            assert time.monotonic() < deadline, path.read_text()
            time.sleep(0.2)
        port = int(parse_qs(urlsplit(found[1]).query)["serve_app_port"][0])
        ask_over_http(home, port)
        during.update(files_below(Path(home.env["TMPDIR"])))


def evaluate(home: PfHome, clone: Path, data: Path) -> None:
    for part in ("flows/phi3_eval", "training/phi3_training/evaluate"):
        ignore = shutil.ignore_patterns("__pycache__", ".promptflow")
        shutil.copytree(ROOT / part, clone / part, ignore=ignore)
    mapping = "input_data=${data.input_data}"
    chat = ["run", "create", "--flow", clone / "flows/phi3_chat", "--data", data]
    assert home.pf(*chat, "--name", "base", "--column-mapping", mapping).code == 0
    file = clone / "flows/phi3_eval/run.yaml"
    scored = ["run", "create", "--file", file, "--run", "base", "--name", "scores"]
    assert home.pf(*scored, "--data", data).code == 0
    assert "exact_match" in home.pf("run", "show-metrics", "--name", "scores").out


def phi3(home: PfHome, *arguments: str | Path, env: Mapping[str, str], code: int = 0) -> None:
    command = [sys.executable, "-m", "phi3_training.cli", *arguments]
    done = home.run(command, env=dict(env))
    assert done.code == code, done.text


def with_traces(home: PfHome, flow: Path) -> None:
    """`pf flow test` that records its spans; Prompt flow's service stores them."""
    settings = home.pf_dir / "pf.yaml"
    before = settings.read_text()
    settings.write_text(TRACES)
    log = home.path / "service.log"
    port = str(free_port())
    with started(
        home, PF, "service", "start", "--debug", "--port", port, env={}, log="service.log"
    ):
        wait_for(f"http://127.0.0.1:{port}/heartbeat", log)
        test = ["flow", "test", "--flow", flow, "--inputs", f"input_data={QUESTION}"]
        assert home.pf(*test, env={"PF_DISABLE_TRACING": "false"}).code == 0
        wrong = {"PF_DISABLE_TRACING": "false", "PHI3_KEY": WRONG_KEY}
        assert home.pf(*test, env={**wrong, "PHI3_ENDPOINT": home.env["PLANTED_URL"]}).code == 1
    settings.write_text(before)


@pytest.fixture(scope="module")
def during() -> dict[str, bytes]:
    """What lay in temporary folders while the chat page was open."""
    return {}


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory, during: dict[str, bytes]) -> Iterator[PfHome]:
    """A HOME in which every command was used, with the right key and with a wrong one."""
    with pf_home(tmp_path_factory.mktemp("commands") / "home") as home, endpoint(KEY) as served:
        home.env |= {"PF_LOGGING_LEVEL": "DEBUG", "PLANTED_URL": served.url}
        right = {"PHI3_ENDPOINT": served.url, "PHI3_KEY": KEY}
        wrong = {"PHI3_ENDPOINT": served.url, "PHI3_KEY": WRONG_KEY}
        flow = home.copy_flow()
        clone = flow.parents[1]
        home.connect(served.url, KEY)
        use_pf(home, flow, wrong)
        use_phi3(home, flow, right, wrong, during)
        evaluate(home, clone, lines_of(home))
        with_traces(home, flow)
        assert len(served.bodies) > 10
        yield home


def lines_of(home: PfHome) -> Path:
    data = home.path / "lines.jsonl"
    data.write_text(
        "".join(
            json.dumps({"input_data": f"{QUESTION} {n}", "expected": "x"}) + "\n" for n in range(3)
        )
    )
    return data


def use_pf(home: PfHome, flow: Path, wrong: Mapping[str, str]) -> None:
    pf_serve = [PF, "flow", "serve", "--skip-open-browser", "--source", flow]
    serve(home, *pf_serve, engine="flask", env={}, status=200, log="serve-flask.log")
    serve(home, *pf_serve, engine="fastapi", env=wrong, status=400, log="serve-fastapi.log")
    build = ["flow", "build", "--source", flow, "--output", home.path / "built"]
    assert home.pf(*build, "--format", "docker").code == 0


def use_phi3(
    home: PfHome,
    flow: Path,
    right: Mapping[str, str],
    wrong: Mapping[str, str],
    during: dict[str, bytes],
) -> None:
    phi3(home, "flow", "pack", flow, "--out", home.path / "dist", env=right)
    phi3(home, "flow", "image", flow, "--out", home.path / "dist", env=right)
    own = [sys.executable, "-m", "phi3_training.cli", "flow", "serve", flow]
    quiet = {**right, "PF_LOGGING_LEVEL": ""}
    serve(home, *own, engine="fastapi", env=quiet, status=200, log="serve-own.log")
    told = {**right, "PF_LOGGING_LEVEL": "INFO"}
    serve(home, *own, engine="fastapi", env=told, status=200, log="serve-own-info.log")
    serve(home, *own, engine="fastapi", env=wrong, status=400, log="serve-own-debug.log")
    data = lines_of(home)
    phi3(home, "batch", data, "--out", home.path / "answers.jsonl", "--details", env=right)
    phi3(home, "batch", data, "--out", home.path / "none.jsonl", "--details", env=wrong, code=1)
    phi3(home, "doctor", "--flow", flow, env=right)
    phi3(home, "doctor", "--flow", flow, "-o", "json", env=wrong, code=1)
    chat_web(home, right, during)


@pytest.mark.slow
@pytest.mark.parametrize("key", [KEY, WRONG_KEY], ids=["accepted", "refused"])
def test_key_is_nowhere_in_clear(used: PfHome, during: dict[str, bytes], key: str) -> None:
    assert leaks(key, everything(used)) == []
    assert leaks(key, during) == []


@pytest.mark.slow
def test_search_covered_what_matters(used: PfHome, during: dict[str, bytes]) -> None:
    names = set(everything(used))
    below = {str(Path(name).relative_to(used.path)) for name in names if name != "output"}
    for wanted in (
        r"\.promptflow/pf\.sqlite$",
        r"\.promptflow/trace\.sqlite$",
        r"\.promptflow/\.runs/base/logs\.txt$",
        r"\.promptflow/\.runs/scores/metrics\.json$",
        r"clone/flows/phi3_chat/\.promptflow/flow\.detail\.json$",
        r"built/.*Dockerfile$",
        r"dist/.*\.zip!.*flow\.dag\.yaml$",
        r"dist/.*-image/Dockerfile$",
        r"answers\.jsonl$",
        r"serve-fastapi\.log$",
        r"serve-own-debug\.log$",
    ):
        assert any(re.match(wanted, name) for name in below), (wanted, sorted(below))
    assert any(name.endswith("page.log") for name in during)
    assert any(name.endswith("pf.sqlite") for name in during)


@pytest.mark.slow
def test_questions_and_answers_are_logged_at_debug_alone(used: PfHome) -> None:
    """An answer repeats its question here. At DEBUG the same search finds it."""
    for name in ("serve-own.log", "serve-own-info.log"):
        log = (used.path / name).read_text(errors="replace")
        assert "to serve it at http://" in log
        assert QUESTION not in log, name
    assert "Executing node" in (used.path / "serve-own-info.log").read_text(errors="replace")
    assert QUESTION in (used.path / "serve-flask.log").read_text(errors="replace")
