"""`phi3 doctor --tool`: the shipped wheel passes, and each seeded fault is named with its fix."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.pf_home import ROOT

from phi3_training.cli import main
from phi3_training.doctor.finding import Finding, State
from phi3_training.errors import StageError
from phi3_training.toolcheck import check_tool, check_wheel
from phi3_training.toolcheck.check import search
from phi3_training.toolcheck.install import Place, beside
from phi3_training.toolcheck.wheel import SOURCES, build

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")
pytest.importorskip("setuptools", "77", reason="setuptools is too old to build without a network")

YAML = "phi3_tool/yamls/phi3_chat.yaml"
CHAT = "phi3_tool/chat.py"
REGISTRY = "phi3_tool/registry.py"
POINTS = "phi3_promptflow-0.1.0.dist-info/entry_points.txt"
Edit = Callable[[str], str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return beside(wheel, tmp_path_factory.mktemp("installed"))


def replaced(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


def listing_only_once(text: str) -> str:
    return replaced("    tools: dict", "    left.pop()\n    tools: dict")(f"{text}\n\nleft = [1]\n")


def spoilt(wheel: Path, folder: Path, edits: dict[str, Edit | None]) -> Path:
    """A copy of the wheel with files edited, or left out where the edit is None."""
    copy = folder / wheel.name
    done = set()
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(copy, "w") as after:
        for name in before.namelist():
            text = before.read(name)
            if name.endswith("/RECORD"):
                lines = text.decode().splitlines(keepends=True)
                left = {left for left, edit in edits.items() if edit is None}
                text = "".join(x for x in lines if x.split(",")[0] not in left).encode()
            if name in edits:
                done.add(name)
                edit = edits[name]
                if edit is None:
                    continue
                text = edit(text.decode()).encode()
            after.writestr(name, text)
    assert done == set(edits)
    return copy


def spoilt_place(installed: Place, folder: Path, edits: dict[str, Edit]) -> Place:
    """A copy of the installed wheel with files edited."""
    copy = folder / "installed"
    shutil.copytree(installed.folder, copy, ignore=shutil.ignore_patterns("phi3_training"))
    for name, edit in edits.items():
        text = (copy / name).read_text(encoding="utf-8")
        (copy / name).write_text(edit(text), encoding="utf-8")
    return replace(installed, folder=copy)


def faults(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.state is State.FAULT]


def test_the_tool_is_found_in_the_wheel_that_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, from the command line."""
    assert main(["doctor", "--tool", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert [(each["check"], each["state"]) for each in told["findings"]] == [
        ("build", "ok"),
        ("files", "ok"),
        ("entry point", "ok"),
        ("install", "ok"),
        ("listing", "ok"),
        ("tool", "ok"),
        ("prompt flow", "ok"),
    ]
    last = told["findings"][-1]["said"]
    assert last == 'Prompt flow lists it as "Phi-3 chat" of phi3-promptflow 0.1.0'


@pytest.mark.parametrize(
    ("edits", "checks", "said", "fix"),
    [
        (
            {POINTS: replaced("[package_tools]", "[other]")},
            ["entry point", "entry point"],
            "no entry point 'package_tools'",
            "entry_points",
        ),
        (
            {YAML: None},
            ["files", "listing"],
            "list_package_tools() lists no tool",
            "package_data",
        ),
    ],
)
def test_what_the_wheel_lacks_is_named_with_its_fix(
    wheel: Path,
    tmp_path: Path,
    edits: dict[str, Edit | None],
    checks: list[str],
    said: str,
    fix: str,
) -> None:
    found = faults(list(check_wheel(spoilt(wheel, tmp_path, edits), tmp_path)))
    assert [finding.check for finding in found] == checks
    assert said in found[-1].said
    assert all(fix in finding.fix for finding in found)


@pytest.mark.parametrize(
    ("name", "edit", "check", "said", "fix"),
    [
        (
            POINTS,
            replaced("list_package_tools", "list_tools"),
            "entry point",
            "the entry point names phi3_tool.registry:list_tools, and there is no such function",
            "correct the entry point",
        ),
        (
            POINTS,
            replaced("phi3_tool.registry", "phi3_tool.listing"),
            "entry point",
            "cannot import phi3_tool.listing: ModuleNotFoundError",
            "setup.py",
        ),
        (
            YAML,
            replaced("name: Phi-3 chat", "name: [Phi-3 chat"),
            "listing",
            "cannot run phi3_tool.registry:list_package_tools(): ParserError",
            "look at phi3_tool.registry",
        ),
        (
            YAML,
            replaced("function: phi3_chat", "function: phi3_talk"),
            "tool",
            "phi3_tool.chat has no function 'phi3_talk'",
            "`function` in the tool's YAML",
        ),
        (
            CHAT,
            replaced("import hashlib\n", "import hashlib\nimport not_installed\n"),
            "tool",
            "cannot import phi3_tool.chat: ModuleNotFoundError: No module named 'not_installed'",
            "install what is missing",
        ),
        (
            REGISTRY,
            listing_only_once,
            "prompt flow",
            "Prompt flow does not list phi3_tool.chat.phi3_chat",
            "pf tool list",
        ),
    ],
)
def test_a_fault_is_named_with_its_fix(
    installed: Place, tmp_path: Path, name: str, edit: Edit, check: str, said: str, fix: str
) -> None:
    (found,) = faults(list(search(spoilt_place(installed, tmp_path, {name: edit}))))
    assert found.check == check
    assert said in found.said
    assert fix in found.fix


def test_all_faults_of_a_tool_are_named_at_once(installed: Place, tmp_path: Path) -> None:
    from phi3_tool.chat import phi3_chat

    code = replaced("import hashlib\n", "from __future__ import annotations\n")
    described = [
        replaced("    input_data:\n", "    question:\n"),
        replaced("- CustomConnection\n      custom", "- Phi3Connection\n      custom"),
        replaced("custom_type:\n      - Phi3Connection", "custom_type:\n      - Other"),
        replaced("chat.list_deployments", "chat.list_models"),
    ]
    edits: dict[str, Edit] = {
        CHAT: lambda text: replaced('@tool(streaming_option_parameter="stream")', "#")(code(text)),
        YAML: lambda text: functools.reduce(lambda now, edit: edit(now), described, text),
    }
    found = faults(list(search(spoilt_place(installed, tmp_path, edits))))
    assert {finding.check for finding in found} == {"tool"}
    assert all(finding.said.startswith("phi3_tool.chat.phi3_chat: ") for finding in found)
    told = [(finding.said.split(": ", 1)[1], finding.fix) for finding in found]
    agree = "make the YAML's inputs and the function's parameters agree"
    names = ", ".join(inspect.signature(phi3_chat).parameters)
    assert told == [
        ("phi3_chat is not a Prompt flow tool", "put @tool above it"),
        (
            f"Prompt flow cannot read the types of {names}, return",
            "remove `from __future__ import annotations` from phi3_tool.chat",
        ),
        ("the YAML has an input 'question' that phi3_chat does not accept", agree),
        ("phi3_chat needs 'input_data', which the YAML does not have", agree),
        (
            "connection: phi3_tool.chat has no connection class Other",
            "import Other there, or correct `custom_type` in the YAML",
        ),
        (
            "connection: Prompt flow cannot resolve the type ['Phi3Connection']",
            "`type: [CustomConnection]` next to `custom_type` in the YAML",
        ),
        (
            "deployment: there is no function phi3_tool.chat.list_models to fill its list",
            "correct `func_path` of deployment in the YAML",
        ),
    ]


def test_a_package_without_the_tool_does_not_find_another_copy(wheel: Path, tmp_path: Path) -> None:
    """This environment has the project installed too; that copy must not stand in."""
    with zipfile.ZipFile(wheel) as archive:
        ours = [name for name in archive.namelist() if name.startswith("phi3_tool/")]
    found = faults(list(check_wheel(spoilt(wheel, tmp_path, dict.fromkeys(ours)), tmp_path)))
    assert {finding.check for finding in found} == {"files", "entry point"}
    assert "cannot import phi3_tool.registry" in found[-1].said


def test_a_wheel_that_does_not_install_is_named(wheel: Path, tmp_path: Path) -> None:
    foreign = tmp_path / wheel.name.replace("py3-none", "cp27-none")
    shutil.copy(wheel, foreign)
    (found,) = faults(list(check_wheel(foreign, tmp_path)))
    assert found.check == "install"
    assert "The wheel cannot be installed: " in found.said
    assert "not a supported wheel" in found.said


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    project = tmp_path / "clone"
    for name in SOURCES:
        if name not in ("tools", "training/phi3_training"):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, project / name)
    (gone,) = check_tool(project)
    assert (gone.check, gone.state) == ("build", State.FAULT)
    assert "tools is missing" in gone.said
    for name in ("tools/phi3_tool", "training/phi3_training"):
        (project / name).mkdir(parents=True)
    with pytest.raises(StageError, match=r"The wheel cannot be built: .*phi3_tool/__init__\.py"):
        build(project, tmp_path)


def test_the_clone_stays_as_it_was(wheel: Path) -> None:
    assert not list(ROOT.glob("build")), "the wheel is built from a copy"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"phi3_tool", "phi3_training", "phi3_promptflow-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name]
