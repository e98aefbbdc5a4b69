"""The chat flow under Prompt flow's own command line: `pf flow`, `pf run`, `pf tool`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tests.integration.pf_home import (
    Done,
    Endpoint,
    PfHome,
    endpoint,
    free_port,
    pf_home,
    without_phi3_tool,
)

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")

KEY = "pf-test-key-20c9"
# Prompt flow's own line: its log scrubber reads every secret by attribute.
PF_SAYS = "Please use connection.secrets[key] to access secrets."


@dataclass
class Bench:
    home: PfHome
    endpoint: Endpoint
    flow: Path

    def test(self, *arguments: str, **options: object) -> Done:
        return self.home.pf("flow", "test", "--flow", self.flow, *arguments, **options)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pf_home(tmp_path_factory.mktemp("pf") / "home") as home, endpoint(KEY) as served:
        home.connect(served.url, KEY)
        yield Bench(home, served, home.copy_flow())


def complaints(done: Done) -> list[str]:
    """Lines on standard error that are not Prompt flow's one known line."""
    return [line for line in done.err.splitlines() if PF_SAYS not in line]


def answer(done: Done) -> dict[str, str]:
    """The JSON object that `pf flow test` prints after its log lines."""
    found = json.loads(done.out[done.out.index("\n{") :])
    assert isinstance(found, dict)
    return found


def test_flow_is_valid(bench: Bench) -> None:
    done = bench.home.pf("flow", "validate", "--source", bench.flow)
    assert (done.code, complaints(done)) == (0, [])
    assert json.loads(done.out) == {"result": "Succeeded"}


def test_flow_answers_and_passes_every_setting_on(bench: Bench) -> None:
    settings = ["system_prompt=Be brief.", "temperature=0.5", "top_p=0.9", "max_new_tokens=9"]
    done = bench.test("--inputs", "input_data=Who founded Contoso?", *settings)
    assert (done.code, complaints(done)) == (0, [])
    assert answer(done) == {"answer": "2: Who founded Contoso?"}
    assert "WARNING" not in done.out
    assert bench.home.processes() == []  # with README's settings no service stays behind
    sent = bench.endpoint.bodies[-1]["input_data"]
    assert sent["input_string"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 9}
    assert sent["parameters"].items() >= wanted.items()


def test_conversation_continues_without_the_package_installed(bench: Bench) -> None:
    """Two turns of `--interactive`; phi3_tool comes from the flow folder alone."""
    masked = without_phi3_tool(bench.home)
    missing = bench.home.python("import phi3_tool", env=masked)
    assert "No module named 'phi3_tool'" in missing.err
    done = bench.test("--interactive", feed="What is a tent?\nHow heavy is it?\n", env=masked)
    assert (done.code, complaints(done)) == (0, [])
    assert "Bot: 1: What is a tent?" in done.out
    assert "Bot: 3: How heavy is it?" in done.out
    assert bench.endpoint.conversations[-1] == [
        {"role": "user", "content": "What is a tent?"},
        {"role": "assistant", "content": "1: What is a tent?"},
        {"role": "user", "content": "How heavy is it?"},
    ]


def test_batch_run_answers_every_sample(bench: Bench) -> None:
    create = ["run", "create", "--file", bench.flow / "run.yaml", "--name", "samples"]
    done = bench.home.pf(*create)
    assert done.code == 0, done.text
    folder = bench.home.pf_dir / ".runs" / "samples"
    assert not (folder / "error.json").exists()
    rows = [json.loads(line) for line in _lines(folder / "flow_outputs" / "output.jsonl")]
    samples = [json.loads(line) for line in _lines(bench.flow / "samples.jsonl")]
    assert rows == [
        {
            "line_number": number,
            "answer": f"{2 * len(sample['chat_history']) + 1}: {sample['input_data']}",
        }
        for number, sample in enumerate(samples)
    ]


def test_package_tool_is_listed(bench: Bench) -> None:
    names = {point.name for point in entry_points(group="package_tools")}
    if "phi3_tool" not in names:
        pytest.skip("phi3-promptflow is not installed here: pip install -e .")
    done = bench.home.pf("tool", "list")
    assert done.code == 0, done.text
    listed = json.loads(done.out)["package"]
    mine = [tool for name, tool in listed.items() if name.startswith("phi3_tool.")]
    assert [tool["name"] for tool in mine] == ["Phi-3 chat"]


def test_an_unknown_input_name_is_reported(bench: Bench) -> None:
    asked = len(bench.endpoint.bodies)
    done = bench.test("--inputs", "question=Who founded Contoso?")
    last = done.out.strip().splitlines()[-1]
    assert (done.code, len(bench.endpoint.bodies)) == (1, asked)
    assert "lacks the input 'input_data': it has only 'question'" in last


def test_wrong_key_is_reported(bench: Bench) -> None:
    env = {"PHI3_ENDPOINT": bench.endpoint.url, "PHI3_KEY": "wrong-key-81"}
    done = bench.test("--inputs", "input_data=Hi", env=env)
    last = done.out.strip().splitlines()[-1]
    assert done.code == 1
    assert "AuthenticationError" in last
    assert "401" in last
    assert "wrong-key-81" not in done.text
    assert KEY not in done.text


def test_missing_endpoint_is_reported(bench: Bench) -> None:
    env = {"PHI3_ENDPOINT": f"http://127.0.0.1:{free_port()}/score", "PHI3_KEY": KEY}
    done = bench.test("--inputs", "input_data=Hi", env=env)
    last = done.out.strip().splitlines()[-1]
    assert done.code == 1
    assert "ServiceError" in last
    assert env["PHI3_ENDPOINT"] in last
    assert KEY not in done.text


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
