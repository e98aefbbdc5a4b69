"""Packing a flow: what goes along, what stays behind, what is refused. Needs no endpoint."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests import forked

from phi3_training.cli import main
from phi3_training.errors import StageError, UsageError
from phi3_training.flow.bundle import Bundle, copy_flow, pack
from phi3_training.flow.source import FlowSource

pytest.importorskip("promptflow", reason="promptflow describes the tools")

ROOT = Path(__file__).parents[2]
FLOW = ROOT / "flows/phi3_chat"
FEED = "https://pkgs.dev.azure.com/org/_packaging/feed/pypi/simple/"
KEY = "planted/Key+in-a-flow=="


@pytest.fixture(scope="module", autouse=True)
def described_quickly() -> Iterator[None]:
    """The process that describes a flow's tools is forked from one that has the libraries."""
    with forked.forked_modules(start_server=False):
        yield


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flow laid out as in the repository, with everything that must not leave."""
    root = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("__pycache__", ".promptflow")
    for part in ("flows/phi3_chat", "tools/phi3_tool"):
        shutil.copytree(ROOT / part, root / part, ignore=ignored)
    flow = root / "flows/phi3_chat"
    for name in (
        ".promptflow/chat.detail.json",
        ".promptflow/flow.log",
        "__pycache__/integrate_with_promptflow.cpython-311.pyc",
        "data.jsonl",
        ".env",
        "notes.txt",
    ):
        (flow / name).parent.mkdir(exist_ok=True)
        (flow / name).write_text("private", encoding="utf-8")
    for name in ("__pycache__/wire.pyc", "customers.jsonl", ".hidden.py"):
        (root / "tools/phi3_tool" / name).parent.mkdir(exist_ok=True)
        (root / "tools/phi3_tool" / name).write_text("private", encoding="utf-8")
    return flow


@pytest.fixture(scope="module")
def bundle(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pack(clone, tmp_path_factory.mktemp("out"))


def source_files() -> set[str]:
    tool = ROOT / "tools/phi3_tool"
    kinds = {".py", ".yaml", ".png", ".typed", ".svg"}
    inside = (p.relative_to(tool) for p in tool.rglob("*") if p.suffix in kinds)
    return {f"phi3_tool/{name.as_posix()}" for name in inside if "__pycache__" not in name.parts}


def copied(clone: Path, folder: Path, old: str = "", new: str = "") -> Path:
    """Another copy of the flow, its definition changed."""
    shutil.copytree(clone.parents[1], folder / "clone")
    flow = folder / "clone/flows/phi3_chat"
    text = (flow / "flow.dag.yaml").read_text(encoding="utf-8")
    assert old in text
    (flow / "flow.dag.yaml").write_text(text.replace(old, new), encoding="utf-8")
    return flow


def test_bundle_holds_the_flow_and_the_tool_and_nothing_else(bundle: Bundle) -> None:
    own = {".amlignore", ".promptflow/flow.tools.json", "flow.dag.yaml", "requirements.txt"}
    own |= {"README.md", "connection.yaml"}
    assert set(bundle.files) == own | {"integrate_with_promptflow.py"} | source_files()
    lying = {
        p.relative_to(bundle.folder).as_posix() for p in bundle.folder.rglob("*") if p.is_file()
    }
    with zipfile.ZipFile(bundle.zip_path) as archive:
        assert lying == set(bundle.files) == set(archive.namelist())
        for name in bundle.files:
            assert archive.read(name) == (bundle.folder / name).read_bytes()
    assert not any((bundle.folder / name).read_bytes() == b"private" for name in lying)


def test_definition_differs_only_in_what_it_no_longer_includes(clone: Path, bundle: Bundle) -> None:
    was, now = ((f / "flow.dag.yaml").read_text(encoding="utf-8") for f in (clone, bundle.folder))
    wanted = yaml.safe_load(was)
    assert wanted.pop("additional_includes")
    assert yaml.safe_load(now) == wanted
    assert "# Chat with a tuned Phi-3." in now  # its comments are kept
    assert "phi3_tool" not in now


def test_tools_are_described_as_prompt_flow_does(bundle: Bundle) -> None:
    text = (bundle.folder / ".promptflow/flow.tools.json").read_text(encoding="utf-8")
    tools = json.loads(text)
    inputs = tools["code"]["integrate_with_promptflow.py"]["inputs"]
    assert tools["package"] == {}
    assert inputs["connection"]["type"] == ["CustomConnection"]
    nodes = yaml.safe_load((bundle.folder / "flow.dag.yaml").read_text(encoding="utf-8"))["nodes"]
    wired = [name for name in inputs if name in nodes[0]["inputs"]]
    assert wired == list(nodes[0]["inputs"])  # in the order in which Studio shows them
    assert str(bundle.folder.parent) not in text


def test_same_flow_gives_the_same_bytes(clone: Path, bundle: Bundle, tmp_path: Path) -> None:
    moved = copied(clone, tmp_path)
    (moved / "flow.dag.yaml").touch()
    out = tmp_path / "out"
    shutil.copytree(bundle.folder.parent, out)  # over one that is there
    (out / "phi3_chat/old.py").touch()
    again = pack(moved, out)
    assert again.zip_path.read_bytes() == bundle.zip_path.read_bytes()
    assert again.sha256 == bundle.sha256
    assert not (out / "phi3_chat/old.py").exists()
    assert {p.name for p in out.iterdir()} == {"phi3_chat", "phi3_chat.zip"}


def test_transcripts_made_in_the_bundle_are_not_uploaded_from_it(bundle: Bundle) -> None:
    """.amlignore as azure-ai-ml reads it: the tools' description travels, transcripts do not."""
    assets = pytest.importorskip("azure.ai.ml._utils._asset_utils", reason="extra `azure`")
    ignore = assets.AmlIgnoreFile(bundle.folder)
    sent = {Path(p).name: ignore.is_file_excluded(bundle.folder / p) for p in bundle.files}
    assert not any(sent.values()), sent
    for name in (".promptflow/flow.detail.json", ".promptflow/chat.output.json", ".env"):
        assert ignore.is_file_excluded(bundle.folder / name)


def test_feed_or_image_replaces_the_source(clone: Path, tmp_path: Path) -> None:
    fed = tmp_path / "fed"
    copy_flow(FlowSource.read(clone), fed, feed=FEED, carry_tool=False)
    lines = (fed / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"--index-url {FEED}"
    assert lines[1].startswith("phi3-promptflow==")
    assert not (fed / "phi3_tool").exists()
    held = tmp_path / "held"
    image = "registry.example/phi3:1.0"
    copy_flow(FlowSource.read(clone), held, image=image, carry_tool=False)
    dag = yaml.safe_load((held / "flow.dag.yaml").read_text(encoding="utf-8"))
    assert dag["environment"]["image"] == image
    assert not (held / "phi3_tool").exists()


def test_modules_beside_the_node_go_along_and_named_files_too(clone: Path, tmp_path: Path) -> None:
    flow = copied(clone, tmp_path)
    node = flow / "integrate_with_promptflow.py"
    text = node.read_text(encoding="utf-8")
    node.write_text(text.replace("from phi3_tool", "import helper  # noqa\nfrom phi3_tool", 1))
    (flow / "helper.py").write_text("from wording import prompts\n", encoding="utf-8")
    (flow / "wording").mkdir()
    (flow / "wording/__init__.py").touch()
    (flow / "wording/prompts.py").touch()
    (flow / "stranger.py").touch()
    found = FlowSource.read(flow).files(extra=["notes.txt"])
    assert {"helper.py", "wording/__init__.py", "wording/prompts.py", "notes.txt"} <= set(found)
    assert "stranger.py" not in found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("- ../../tools/phi3_tool", "- ../../gone", "additional_includes names ../../gone"),
        ("path: integrate_with_promptflow.py", "path: gone.py", "gone.py is named, but is not in"),
        ("path: integrate_with_promptflow.py", "path: ../README.md", "is not in"),
        ("nodes:", "knots:", "has no list of nodes"),
        ("inputs:\n", "inputs: [\n", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_broken_definition_is_named(
    clone: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    flow = copied(clone, tmp_path, old, new)
    with pytest.raises(UsageError) as caught:
        pack(flow, tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out/phi3_chat").exists()


def test_node_that_cannot_be_loaded_leaves_nothing(clone: Path, tmp_path: Path) -> None:
    flow = copied(clone, tmp_path)
    (flow / "integrate_with_promptflow.py").write_text("import surely_not_there\n")
    with pytest.raises(StageError, match="surely_not_there"):
        pack(flow, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_only_this_machine_has_is_refused(clone: Path, tmp_path: Path) -> None:
    flow = copied(clone, tmp_path)
    for line in ("./phi3.whl", "-e ../..", "phi3 @ file:///tmp/phi3.whl", "wheels/phi3-1.whl"):
        (flow / "requirements.txt").write_text(f"requests\n{line}\n", encoding="utf-8")
        with pytest.raises(UsageError, match="--feed URL") as caught:
            pack(flow, tmp_path / "out")
        assert line in str(caught.value)


@pytest.mark.parametrize(
    "feed", ["http://f.example/simple", "https://me:tok3n@f.example/", "https://f.example/?k=tok3n"]
)
def test_feed_carries_no_secret(clone: Path, tmp_path: Path, feed: str) -> None:
    with pytest.raises(UsageError) as caught:
        pack(clone, tmp_path / "out", feed=feed)
    assert "tok3n" not in str(caught.value)


def test_key_of_the_environment_is_refused(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = copied(clone, tmp_path, "Maximum length", KEY)
    monkeypatch.setenv("PHI3_KEY", KEY)
    with pytest.raises(UsageError, match=r"occurs in flow\.dag\.yaml") as caught:
        pack(flow, tmp_path / "out")
    assert KEY not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_somebodys_own_folder_is_not_replaced(clone: Path, tmp_path: Path) -> None:
    mine = tmp_path / "phi3_chat"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is not a bundle"):
        pack(clone, tmp_path)
    assert (mine / "thesis.txt").exists()
    with pytest.raises(UsageError, match="the flow itself"):
        pack(clone, clone.parent)


def test_another_bundle_is_not_overwritten_in_silence(
    clone: Path, bundle: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(bundle.folder.parent, tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        pack(clone, tmp_path / "out", image="phi3-session:1")
    assert pack(clone, tmp_path / "out", image="phi3-session:1", overwrite=True)


def test_bundle_names_the_keyring_of_a_machine_without_a_desktop(bundle: Bundle) -> None:
    assert "keyrings.alt" in (bundle.folder / "requirements.txt").read_text(encoding="utf-8")


def test_bundle_explains_what_to_type(bundle: Bundle) -> None:
    said = (bundle.folder / "README.md").read_text(encoding="utf-8")
    connection = yaml.safe_load((bundle.folder / "connection.yaml").read_text(encoding="utf-8"))
    assert (connection["name"], connection["type"]) == ("phi3_connection", "custom")
    assert 'pip install "promptflow>=1.18.5,<2" "filelock<3.30" -r requirements.txt' in said
    assert "pf connection create --file connection.yaml" in said
    assert 'pf flow test --flow . --inputs input_data="Hello?"' in said
    assert max(map(len, said.splitlines())) <= 100


def test_package_tool_asks_where_it_is_installed_from(tmp_path: Path) -> None:
    flow = tmp_path / "flow"
    flow.mkdir()
    node = {
        "name": "a",
        "type": "python",
        "source": {"type": "package", "tool": "phi3_tool.chat.x"},
    }
    (flow / "flow.dag.yaml").write_text(yaml.safe_dump({"nodes": [node]}), encoding="utf-8")
    assert FlowSource.read(flow).uses_phi3_tool
    with pytest.raises(UsageError, match="--feed URL or --image NAME"):
        pack(flow, tmp_path / "out")


def test_command_prints_what_it_wrote(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: Bundle
) -> None:
    assert main(["flow", "pack", str(clone), "--out", str(tmp_path), "-o", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sha256"] == bundle.sha256
    assert said["files"] == list(bundle.files)
    assert main(["flow", "pack", str(tmp_path / "nowhere")]) == 2
    assert "is not a flow" in capsys.readouterr().err


def test_the_image_has_a_worker_for_each_core(
    monkeypatch: pytest.MonkeyPatch, clone: Path, tmp_path: Path
) -> None:
    assert main(["flow", "image", str(clone), "--out", str(tmp_path)]) == 0
    monkeypatch.syspath_prepend(str(tmp_path))  # the file puts its flow in front; undone with this
    monkeypatch.setenv("PHI3_ENDPOINT", "https://x.eastus.inference.ml.azure.com/score")
    monkeypatch.setenv("PHI3_KEY", KEY)
    monkeypatch.delenv("PROMPTFLOW_WORKER_NUM", raising=False)
    started = runpy.run_path(str(tmp_path / "phi3_chat-image/gunicorn.conf.py"))
    assert started["workers"] == started["cores"]()

    quota = {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}
    monkeypatch.setattr(Path, "read_text", lambda path, **_: quota[str(path)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)
    assert started["cores"]() == 2  # a container of one core and a half
    quota["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert started["cores"]() == 8
