"""Prompt flow and the agent, each in its environment: the same requests, answers and errors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from phi3_training.agent.convert import convert
from phi3_training.agent.environment import agent_python, environment
from phi3_training.agent.golden import golden_rows
from phi3_training.agent.parity import compare
from phi3_training.agent.recorder import Recorder, Reply
from phi3_training.cli import main
from phi3_training.errors import StageError

try:
    PYTHON = agent_python()
except StageError as error:
    pytest.skip(f"no environment of the agent: {error}", allow_module_level=True)

FLOW = """\
inputs:
  topic: {type: string, is_chat_input: true}
  count: {type: int, default: 2}
outputs:
  text: {type: string, reference: "${ask.output}"}
nodes:
- name: ask
  type: python
  source: {type: code, path: ask.py}
  inputs: {link: my_own, prompt: "${words.output}", count: "${numbers.output.count}"}
- name: words
  type: prompt
  source: {type: code, path: words.jinja2}
  inputs: {topic: "${inputs.topic}", numbers: "${numbers.output.listed}"}
- name: numbers
  type: python
  source: {type: code, path: numbers_of.py}
  inputs: {count: "${inputs.count}"}
"""
NUMBERS = """\
from promptflow.core import tool
from own_helper import listed

@tool
def numbers_of(count: int) -> dict:
    return {"listed": listed(count), "count": count}
"""
ASK = """\
from promptflow.core import tool
from promptflow.connections import CustomConnection
from phi3_tool import Phi3Client

@tool
def ask(link: CustomConnection, prompt: str, count: int) -> str:
    with Phi3Client.from_connection(link) as client:
        return client.chat([{"role": "user", "content": prompt}], max_new_tokens=count).text
"""


@pytest.fixture
def own_flow(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in {
        "flow.dag.yaml": FLOW,
        "numbers_of.py": NUMBERS,
        "ask.py": ASK,
        "words.jinja2": "About {{ topic }}:\n{% for n in numbers %}\n- {{ n }}\n{% endfor %}\n",
        "own_helper.py": "def listed(count):\n    return list(range(count))\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"topic": "{{ tents }} ü <|end|>"}, {"topic": "stoves", "count": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_golden_rows_are_the_same() -> None:
    found = list(compare(golden_rows()))
    assert [(each.name, each.difference) for each in found if each.difference] == []
    assert len(found) == len(golden_rows())
    answered = [each for each in found if not each.error]
    assert len(answered) > len(found) / 2


def test_a_flow_of_ones_own_is_converted_and_runs(
    own_flow: Path, rows: Path, tmp_path: Path
) -> None:
    done = convert(own_flow, rows, tmp_path / "agent")
    assert {"agent.py", "flow.json", "ask.py", "own_helper.py", "words.jinja2"} <= set(done.files)
    assert (done.rows, done.requests) == (4, 4)
    with Recorder({"1": [Reply(text="It does.")]}).running() as endpoint:
        address = {"PHI3_ENDPOINT": endpoint.address("agent", "1", "score"), "PHI3_KEY": "k"}
        answer = subprocess.run(
            [str(PYTHON), str(done.folder / "agent.py"), "tents"],
            env=environment(address),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert b"About tents:" in endpoint.requests("agent", "1")[0].body
    assert answer.stdout == "It does.\n"


def test_a_batch_through_the_agent_writes_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "questions.jsonl"
    turn = {"inputs": {"input_data": "one"}, "outputs": {"answer": "two"}}
    lines = [{"input_data": f"question {i}", "chat_history": [turn] * (i % 3)} for i in range(40)]
    lines[7]["top_p"] = 3
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with Recorder({}).running() as endpoint:
        monkeypatch.setenv("PHI3_ENDPOINT", endpoint.address("agent", "1", "score"))
        monkeypatch.setenv("PHI3_KEY", "k-e-y")
        for name, more in (("plain", []), ("agent", ["--agent"])):
            out = tmp_path / f"{name}.jsonl"
            assert main(["batch", str(data), "--out", str(out), *more]) == 1  # line 7 fails
        bodies = sorted(request.body for request in endpoint.requests("agent", "1"))
    assert bodies[::2] == bodies[1::2]
    assert len(bodies) == 2 * 39
    plain, agent = ((tmp_path / f"{n}.jsonl").read_text("utf-8") for n in ("plain", "agent"))
    assert agent == plain


def test_the_command_starts_the_agent_with_the_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with Recorder({"1": [Reply(pieces=["It ", "does."]), Reply(401)]}).running() as endpoint:
        monkeypatch.setenv("PHI3_ENDPOINT", endpoint.address("agent", "1", "openai"))
        monkeypatch.setenv("PHI3_KEY", "k-e-y")
        words = ["--runs", str(tmp_path), "--session", "s"]
        assert main(["agent", "chat", *words, "- a question"]) == 0
        assert capfd.readouterr().out == "It does.\n"
        assert main(["agent", "chat", *words, "again"]) == 1
        told = capfd.readouterr().err
    assert "does not accept the key" in told
    assert "Traceback" not in told
    (kept,) = json.loads((tmp_path / ".agent/sessions/s.json").read_text(encoding="utf-8"))
    assert kept["inputs"]["input_data"] == "- a question"
