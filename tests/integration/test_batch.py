"""`phi3 batch` against a real endpoint: what it writes, what it survives, how it goes on."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.integration.stub_endpoint import KEY, Reply, Seen, StubEndpoint

from phi3_tool import Phi3Client, ThrottledError
from phi3_training.batch import Line, Pace, ask_all, asker, read_lines
from phi3_training.cli import main
from phi3_training.errors import UsageError

ROOT = Path(__file__).parents[2]


def question(seen: Seen) -> str:
    return str(json.loads(seen.body)["input_data"]["input_string"][-1]["content"])


def echo(seen: Seen) -> Reply:
    return Reply(body=json.dumps({"output": f"Re: {question(seen)}"}).encode())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [{"input_data": f"Question {n}", "expected": f"Answer {n}"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    def names(stub: StubEndpoint) -> None:
        monkeypatch.setenv("PHI3_ENDPOINT", stub.url())
        monkeypatch.setenv("PHI3_KEY", KEY)

    return names


def test_every_line_is_answered_in_order_with_the_columns_of_pf_run(
    data: Path, at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with StubEndpoint(script=echo) as stub:
        at(stub)
        assert main(["batch", str(data), "-o", "json"]) == 0
        assert stub.connections <= 40
    said = json.loads(capsys.readouterr().out)
    out = data.with_name("questions.answers.jsonl")
    assert (said["out"], said["answered"], said["failed"]) == (str(out), 40, 0)
    assert rows(out) == [{"line_number": n, "answer": f"Re: Question {n}"} for n in range(40)]


def test_lines_may_set_what_the_flow_takes(tmp_path: Path, at: Any) -> None:
    history = [{"inputs": {"input_data": "Hi"}, "outputs": {"answer": "Hello"}}]
    line = {"ask": "How?", "chat_history": history, "system_prompt": "Brief.", "temperature": 0.5}
    data = tmp_path / "d.jsonl"
    data.write_text(f"\n{json.dumps(line)}\n", encoding="utf-8")
    with StubEndpoint(script=echo) as stub:
        at(stub)
        words = ["--map", "input_data=ask", "--max-new-tokens", "9", "--details"]
        assert main(["batch", str(data), *words]) == 0
        body = json.loads(stub.seen[0].body)["input_data"]
    assert [m["content"] for m in body["input_string"]] == ["Brief.", "Hi", "Hello", "How?"]
    assert body["parameters"].items() >= {"temperature": 0.5, "max_new_tokens": 9}.items()
    (row,) = rows(tmp_path / "d.answers.jsonl")
    assert (row["ask"], row["answer"], row["error"]) == ("How?", "Re: How?", "")
    assert row["seconds"] > 0


def test_failed_lines_are_written_counted_and_done_again_alone(
    data: Path, at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"Question 3", "Question 17"}

    def script(seen: Seen) -> Reply:
        return Reply(400, b'{"message": "too long"}') if question(seen) in broken else echo(seen)

    out = data.with_name("out.jsonl")
    command = ["batch", str(data), "--out", str(out)]
    with StubEndpoint(script=script) as stub:
        at(stub)
        assert main(command) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "2 of 40 lines failed (2 RequestRejectedError)" in said
        assert f"phi3 batch {data} --out {out} --resume" in said
        failed = {row["line_number"]: row for row in rows(out) if "error" in row}
        assert set(failed) == {3, 17}
        assert failed[3]["answer"] is None
        assert failed[3]["error"].startswith("RequestRejectedError: ")
        assert [row["line_number"] for row in rows(out)] == list(range(40))

        assert main(command) == 2  # what is there is not overwritten
        assert "--resume" in capsys.readouterr().err
        broken.clear()
        stub.seen.clear()
        assert main([*command, "--resume"]) == 0
        assert sorted(question(seen) for seen in stub.seen) == ["Question 17", "Question 3"]
    assert rows(out) == [{"line_number": n, "answer": f"Re: Question {n}"} for n in range(40)]


def test_refused_key_stops_at_once_and_the_rest_can_be_done_later(
    data: Path, at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.with_name("out.jsonl")
    command = ["batch", str(data), "--out", str(out)]
    with StubEndpoint(Reply(401, b'{"message": "no"}', delay=0.01)) as stub:
        at(stub)
        assert main([*command, "--concurrency", "2"]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "AuthenticationError" in said
        assert "were not sent" in said
        assert KEY not in said
        assert len(stub.seen) < 10
        assert all("error" in row for row in rows(out))
    with StubEndpoint(script=echo) as stub:  # the key is fixed; the port is another one
        at(stub)
        assert main([*command, "--resume"]) == 0
    assert len(rows(out)) == 40


def test_changed_data_or_settings_do_not_go_together(
    data: Path, at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.with_name("out.jsonl")
    with StubEndpoint(script=echo) as stub:
        at(stub)
        assert main(["batch", str(data), "--out", str(out)]) == 0
        before = out.read_bytes()
        again = ["batch", str(data), "--out", str(out), "--resume"]
        assert main([*again, "--temperature", "1"]) == 2
        assert "different parameters" in capsys.readouterr().err
        with data.open("a", encoding="utf-8") as stream:
            stream.write('{"input_data": "One more"}\n')
        assert main(again) == 2
        assert out.read_bytes() == before
        data.with_name("theirs.jsonl").write_text("{}\n")
        assert (
            main(["batch", str(data), "--out", str(data.with_name("theirs.jsonl")), "--resume"])
            == 2
        )


def test_signs_that_look_like_ends_of_lines_stay_in_theirs(tmp_path: Path, at: Any) -> None:
    text = "one\u2028two\x85three"
    data, out = tmp_path / "d.jsonl", tmp_path / "out.jsonl"
    data.write_text(json.dumps({"input_data": text}, ensure_ascii=False), encoding="utf-8")
    with StubEndpoint(script=echo) as stub:
        at(stub)
        assert main(["batch", str(data), "--out", str(out)]) == 0
        assert main(["batch", str(data), "--out", str(out), "--resume"]) == 0
        assert len(stub.seen) == 1
    (row,) = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert row == {"line_number": 0, "answer": f"Re: {text}"}


def test_broken_thread_ends_the_batch_instead_of_hanging(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: queue.SimpleQueue[Any] = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", seen.put)

    def ask(line: Line) -> Any:
        raise KeyError("a fault of our own")

    with pytest.raises(RuntimeError, match="crashed"):
        list(ask_all(ask, read_lines(data, {}), concurrency=1))
    assert seen.get(timeout=30).exc_type is KeyError


def test_killed_batch_loses_nothing_finished(data: Path) -> None:
    """SIGKILL in the middle; what was written is kept, and only the rest is asked."""
    out = data.with_name("out.jsonl")
    held, asked = threading.Event(), Counter[str]()

    def script(seen: Seen) -> Reply:
        asked[question(seen)] += 1
        if len(asked) > 20 and not held.is_set():
            held.wait(60)
        return echo(seen)

    with StubEndpoint(script=script) as stub:
        env = {
            **os.environ, "PHI3_ENDPOINT": stub.url(), "PHI3_KEY": KEY, "NO_PROXY": "*",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT / "training")]),
        }  # fmt: skip
        command = [sys.executable, "-m", "phi3_training.cli", "batch", str(data), "--out", str(out)]
        command += ["--concurrency", "4"]
        with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and not (
                out.is_file() and len(out.read_bytes()) > 600
            ):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        finished = {row["line_number"] for row in rows(out)}
        assert len(finished) >= 10
        with out.open("a", encoding="utf-8") as stream:
            stream.write('{"line_number": 39, "ans')  # as a kill in the middle of a write leaves it
        held.set()
        asked.clear()
        done = subprocess.run([*command, "--resume"], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {f"Question {n}" for n in finished} & set(asked)
    assert rows(out) == [{"line_number": n, "answer": f"Re: Question {n}"} for n in range(40)]


def test_throttled_endpoint_gets_every_line_in_the_end(data: Path) -> None:
    """One request at a time and 429 for the others: fewer are asked at once, none is lost."""
    free = threading.Lock()

    def script(seen: Seen) -> Reply:
        if not free.acquire(blocking=False):
            return Reply(429, b"busy", headers={"retry-after-ms": "5"})
        try:
            time.sleep(0.005)
            return echo(seen)
        finally:
            free.release()

    with StubEndpoint(script=script) as stub, Phi3Client(stub.url(), KEY, max_retries=2) as client:
        lines = read_lines(data, {})
        defaults = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 9}
        found = list(ask_all(asker(client.chat, defaults, 4096), lines, concurrency=16))
    errors = [o for o in found if o.error is not None]
    assert all(isinstance(outcome.error, ThrottledError) for outcome in errors)
    assert len(errors) <= 4
    assert sorted(outcome.line.number for outcome in found) == list(range(40))


def test_pace_falls_by_half_and_rises_again() -> None:
    pace = Pace(8)
    with pace as first:
        for _ in range(5):  # all were in flight together: that is one reason to slow down, not five
            pace.throttled(first)
    with pace as second:
        pace.throttled(second)
    with pace, pace:
        refused = threading.Thread(target=pace.__enter__, daemon=True)
        refused.start()
        refused.join(0.2)
        assert refused.is_alive()  # a third one waits
        for _ in range(3):
            pace.answered()
        refused.join(10)
        assert not refused.is_alive()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "d.jsonl:1: not JSON"),
        ("[]", "not a JSON object"),
        ('{"text": "Hi"}', "--map input_data=COLUMN"),
        ('{"prompt": "a", "Question": "b"}', "prompt, Question could all be the question"),
        ('{"input_data": "  "}', "no text"),
        ("\n\n", "has no lines"),
        ('{"input_data": "Hi", "max_new_tokens": "9"}', "max_new_tokens must be a whole number"),
        ('{"input_data": "Hi", "chat_history": "none", "top_p": true}', "top_p must be a number"),
    ],
)
def test_faults_of_the_data_are_named_before_anything_is_sent(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{text}\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_lines(path, {})
    assert said in str(caught.value)


def test_tables_are_read_and_an_obvious_column_is_the_question(tmp_path: Path) -> None:
    path, notes = tmp_path / "d.csv", list[str]()
    path.write_text("Question,temperature\nWhat is it?,0.5\nHow heavy?,\n", encoding="utf-8")
    lines = read_lines(path, {}, notes.append)
    assert [line.columns["input_data"] for line in lines] == ["What is it?", "How heavy?"]
    assert [line.columns.get("temperature") for line in lines] == [0.5, None]
    assert notes == ["Questions from the column Question"]
