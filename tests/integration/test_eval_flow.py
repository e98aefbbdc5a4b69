"""The evaluation flow as a run over a run, and over the rows of `phi3 batch`: no line vanishes."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from tests.integration.pf_home import ROOT, PfHome, pf_home, without_phi3_tool
from tests.integration.stub_endpoint import KEY, Reply, Seen, StubEndpoint

from phi3_training.evaluate.metrics import exact_match, rouge_l, token_f1
from phi3_training.flow.source import FlowSource

pytest.importorskip("promptflow._sdk", reason="the extra `flow` is not installed")

FLOW = ROOT / "flows/phi3_eval"
EXPECTED = "The stove burns dry pine cones."
SAID = [EXPECTED, "", "The stove burns wet pine cones.", "No idea.", ""]
FAILED = [1, 4]


def answer(seen: Seen) -> Reply:
    """What SAID has for the question's number; 400 where that is nothing."""
    question = json.loads(seen.body)["input_data"]["input_string"][-1]["content"]
    text = SAID[int(question.split()[1])]
    if not text:
        return Reply(400, b'{"message": "the prompt is too long"}')
    return Reply(body=json.dumps({"output": text}).encode())


@dataclass
class Bench:
    """Lines of which two fail, asked by `phi3 batch`; and what scores them."""

    home: PfHome
    flow: Path
    data: Path
    rows: Path

    def score(self, name: str, *words: str | Path, mapping: dict[str, str]) -> dict[str, Any]:
        columns = [f"{column}={source}" for column, source in mapping.items()]
        create = ["run", "create", "--flow", self.flow, "--name", name, *words]
        masked = without_phi3_tool(self.home)  # phi3_training is not installed for it either
        done = self.home.pf(*create, "--column-mapping", *columns, env=masked)
        assert done.code == 0, done.text
        assert json.loads(done.out[done.out.index("\n{") :])["status"] == "Completed"
        shown = self.home.pf("run", "show-metrics", "--name", name)
        found = json.loads(shown.out[shown.out.index("{") :])
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("eval")
    data = folder / "data.jsonl"
    lines = [{"input_data": f"Question {n}", "expected": EXPECTED} for n in range(len(SAID))]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pf_home(folder / "home") as home, StubEndpoint(script=answer) as stub:
        home.connect(stub.url(), KEY)
        home.copy_flow()
        for part in ("flows/phi3_eval", "training/phi3_training/evaluate"):
            ignored = shutil.ignore_patterns("__pycache__", ".promptflow")
            shutil.copytree(ROOT / part, home.path / "clone" / part, ignore=ignored)
        rows = folder / "rows.jsonl"
        batch = [sys.executable, "-m", "phi3_training.cli", "batch", data, "--out", rows]
        env = {"PHI3_ENDPOINT": stub.url(), "PHI3_KEY": KEY}
        assert home.run([*batch, "--details"], env=env).code == 1  # two lines failed
        yield Bench(home, home.path / "clone/flows/phi3_eval", data, rows)


def expected_metrics() -> dict[str, Any]:
    """By the functions of `phi3 evaluate`, a failed line as all wrong."""
    pairs = [(text, EXPECTED) for text in SAID if text]
    return {
        "lines": 5,
        "failed": 2,
        "error_rate": 0.4,
        "failed_lines": "1, 4",
        "exact_match": sum(exact_match(*pair) for pair in pairs) / 5,
        "token_f1": pytest.approx(sum(token_f1(*pair) for pair in pairs) / 5),
        "rouge_l": pytest.approx(sum(rouge_l(*pair) for pair in pairs) / 5),
    }


def check(metrics: dict[str, Any]) -> None:
    latency = {key: metrics.pop(key) for key in list(metrics) if key.startswith("latency_")}
    assert metrics == expected_metrics()
    assert list(latency) == [f"latency_p{share}_ms" for share in (50, 90, 95, 99)]
    assert all(math.isfinite(value) and value > 0 for value in latency.values())
    assert sorted(latency.values()) == list(latency.values())


@pytest.mark.slow
def test_run_over_a_run_counts_and_names_the_lines_that_prompt_flow_drops(bench: Bench) -> None:
    chat = bench.home.path / "clone/flows/phi3_chat"
    base = ["run", "create", "--flow", chat, "--data", bench.data, "--name", "base"]
    done = bench.home.pf(*base, "--column-mapping", "input_data=${data.input_data}")
    assert done.code == 0, done.text
    mapping = {
        "answer": "${run.outputs.answer}", "expected": "${data.expected}", "base_run": "base",
    }  # fmt: skip
    check(bench.score("scores", "--data", bench.data, "--run", "base", mapping=mapping))
    details = bench.home.pf("run", "show-details", "--name", "scores")
    assert details.code == 0
    page = bench.home.pf("run", "visualize", "--names", "base,scores")
    assert page.code == 0
    (html,) = (bench.home.path / "tmp").glob("pf-visualize-detail-*.html")
    text = html.read_text(encoding="utf-8")
    assert "token_f1" in text
    assert KEY not in text
    kept = bench.home.pf_dir / ".runs/scores/node_artifacts/aggregate/000000000.jsonl"
    failed = json.loads(kept.read_text(encoding="utf-8"))["run_info"]["output"]["failed"]
    assert list(failed) == ["1", "4"]
    assert all("RequestRejectedError" in error for error in failed.values())


def test_rows_of_phi3_batch_are_scored_with_their_failures(bench: Bench) -> None:
    """Also where other tools wrote them: no `error` key where there was none, or null."""
    lines = [json.loads(line) for line in bench.rows.read_text(encoding="utf-8").splitlines()]
    lines[0]["error"] = None
    del lines[2]["error"]
    bench.rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    columns = ("answer", "expected", "error", "seconds", "line_number")
    mapping = {name: f"${{data.{name}}}" for name in columns}
    check(bench.score("batch", "--data", bench.rows, mapping=mapping))


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The flow's modules, beside the scorers as Prompt flow lays them."""
    for folder in (FLOW, ROOT / "training/phi3_training/evaluate", ROOT / "tools/phi3_tool"):
        monkeypatch.syspath_prepend(str(folder))
    names = ("metrics", "promptflow_fixes", "base_run", "score_line", "aggregate")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_scorers_are_the_librarys_own(modules: dict[str, ModuleType]) -> None:
    own = ROOT / "training/phi3_training/evaluate/metrics.py"
    assert Path(str(modules["metrics"].__file__)) == own
    assert FlowSource.read(FLOW).files()["metrics.py"] == own
    assert list(FLOW.rglob("metrics.py")) == []


def test_empty_cells_are_no_numbers_and_no_errors(modules: dict[str, ModuleType]) -> None:
    score = modules["score_line"].score_line
    line = score(answer=EXPECTED, expected=EXPECTED, error=None, seconds=math.nan)
    assert (line["seconds"], line["error"], line["exact_match"]) == (None, "", 1.0)
    line = score(answer=None, expected=EXPECTED, error="ThrottledError: busy", seconds=None)
    assert (line["error"], line["token_f1"]) == ("ThrottledError: busy", 0.0)


def test_unmapped_columns_are_reported_and_do_not_score_0(modules: dict[str, ModuleType]) -> None:
    inputs = yaml.safe_load((FLOW / "flow.dag.yaml").read_text(encoding="utf-8"))["inputs"]
    assert [name for name, about in inputs.items() if "default" not in about] == ["expected"]
    score, aggregate = modules["score_line"].score_line, modules["aggregate"].aggregate
    for nothing in (None, "", " "):
        with pytest.raises(ValueError, match=r"'expected' is null or empty.*--column-mapping"):
            score(expected=nothing, answer="a")
    unmapped = score(expected="a")
    assert (unmapped["error"], unmapped["exact_match"]) == ("no answer", 0.0)
    with pytest.raises(ValueError, match=r"No line has an answer.*--column-mapping"):
        aggregate([unmapped, unmapped], [])
    assert aggregate([unmapped, score(expected="a", answer="a")], [])["metrics"]["failed"] == 1


def test_percentiles_lie_between_values(modules: dict[str, ModuleType]) -> None:
    percentile = modules["aggregate"].percentile
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 90) == pytest.approx(4.6)
    assert percentile([7.0], 99) == 7.0


def test_misspelt_run_does_not_pass_for_one_without_failures(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PF_HOME_DIRECTORY", str(tmp_path))
    line = modules["score_line"].score_line(answer="a", expected="a")
    found = modules["aggregate"].aggregate([line], ["base"])  # in the cloud: said, not raised
    assert found["metrics"]["lines"] == 1
    (tmp_path / ".runs").mkdir()
    with pytest.raises(ValueError, match="no record on this machine"):
        modules["aggregate"].aggregate([line], ["base"])
    assert modules["base_run"].record_of("../../etc") is None
