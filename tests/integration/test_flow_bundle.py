"""The packed flow where nothing of ours is installed: unpacked, tested and built by Prompt flow."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.linked_venv import closure, linked_venv
from tests.integration.pf_home import Done, Endpoint, PfHome, endpoint, pf_home

from phi3_training.flow.bundle import Bundle, pack

pytest.importorskip("promptflow._sdk", reason="the extra `flow` is not installed")

ROOT = Path(__file__).parents[2]
KEY = "bundle-key-62d/1+8=="


@dataclass
class Bench:
    """A HOME with a connection, an environment without our packages, and the unpacked flow."""

    home: PfHome
    endpoint: Endpoint
    python: Path
    flow: Path
    bundle: Bundle

    def pf(self, *words: str | Path) -> Done:
        command = [self.python, "-m", "promptflow._cli._pf.entry", *words]
        return self.home.run(command, cwd=self.home.path, env={"PYTHONPATH": ""})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bundle")
    bundle = pack(ROOT / "flows/phi3_chat", folder / "out")
    python = linked_venv(folder / "venv", closure("promptflow", "keyrings.alt"))
    with pf_home(folder / "home") as home, endpoint(KEY) as served:
        home.connect(served.url, KEY)
        flow = home.path / "imported"
        with zipfile.ZipFile(bundle.zip_path) as archive:
            archive.extractall(flow)
        yield Bench(home, served, python, flow, bundle)


def test_flow_answers_where_our_package_is_not_installed(bench: Bench) -> None:
    code = (
        "import importlib.util as u; print(u.find_spec('phi3_tool'), u.find_spec('phi3_training'))"
    )
    bare = bench.home.run([bench.python, "-I", "-c", code])
    assert bare.out.split() == ["None", "None"]
    done = bench.pf("flow", "test", "--flow", bench.flow, "--inputs", "input_data=Who are you?")
    assert done.code == 0, done.text
    assert json.loads(done.out[done.out.index("\n{") :]) == {"answer": "1: Who are you?"}


def test_tools_are_described_as_pf_describes_them(bench: Bench) -> None:
    kept = bench.bundle.folder / ".promptflow/flow.tools.json"
    done = bench.pf("flow", "validate", "--source", bench.flow)
    assert (done.code, json.loads(done.out)) == (0, {"result": "Succeeded"})
    theirs = json.loads((bench.flow / ".promptflow/flow.tools.json").read_text(encoding="utf-8"))
    assert json.loads(kept.read_text(encoding="utf-8"))["code"] == theirs["code"]


def test_prompt_flows_own_docker_build_still_works_on_the_flow(bench: Bench) -> None:
    """And puts in it what ours leaves out: the reason for `phi3 flow image`."""
    out = bench.home.path / "built"
    flow = bench.home.copy_flow()
    (flow / ".promptflow").mkdir()
    (flow / ".promptflow/chat.output.json").write_text("{}", encoding="utf-8")
    done = bench.pf("flow", "build", "--source", flow, "--format", "docker", "--output", out)
    assert done.code == 0, done.text
    assert (out / "flow/phi3_tool/chat.py").is_file()
    dockerfile = (out / "Dockerfile").read_text(encoding="utf-8")
    assert "python=3.9" in dockerfile
    assert "samples.jsonl" in {path.name for path in out.rglob("*")}
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert KEY.encode() not in path.read_bytes(), path


def test_key_is_nowhere_in_the_bundle_or_the_test(bench: Bench) -> None:
    assert KEY.encode() not in bench.bundle.zip_path.read_bytes()
    for path in (path for path in bench.flow.rglob("*") if path.is_file()):
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "\n".join(bench.home.printed)
