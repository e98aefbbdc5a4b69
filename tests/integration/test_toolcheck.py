"""`phi3 doctor --tool`: the shipped wheel passes, and each seeded fault is named with its fix."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.pf_home import ROOT
from tests.integration.wheel import built_wheel

from phi3_tool import __version__
from phi3_training.cli import main
from phi3_training.doctor.finding import Finding, State
from phi3_training.doctor.package_tool import build, check_tool, install_alone, search
from phi3_training.errors import StageError

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")
pytest.importorskip("setuptools", "77", reason="setuptools is too old to build without a network")

YAML = "phi3_tool/yamls/phi3_chat.yaml"
CHAT = "phi3_tool/chat.py"
REGISTRY = "phi3_tool/registry.py"
INFO = f"phi3_promptflow-{__version__}.dist-info"
POINTS = f"{INFO}/entry_points.txt"
Edit = Callable[[str], str]


@pytest.fixture(scope="module")
def wheel() -> Path:
    return built_wheel()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_alone(wheel, tmp_path_factory.mktemp("installed"))


def replaced(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return edit


def listing_only_once(text: str) -> str:
    return replaced("    tools: dict", "    left.pop()\n    tools: dict")(f"{text}\n\nleft = [1]\n")


def spoilt_place(installed: Path, folder: Path, edits: dict[str, Edit | None]) -> Path:
    """A copy of the installed wheel with files edited, or left out where the edit is None."""
    copy = folder / "installed"
    shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("phi3_training"))
    for name, edit in edits.items():
        if edit is None:
            (copy / name).unlink()
        else:
            text = (copy / name).read_text(encoding="utf-8")
            (copy / name).write_text(edit(text), encoding="utf-8")
    return copy


def faults(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.state is State.FAULT]


def test_the_tool_is_found_in_the_wheel_that_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, from the command line."""
    assert main(["doctor", "--tool", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert [(each["check"], each["state"]) for each in told["findings"]] == [
        ("build", "ok"),
        ("install", "ok"),
        ("listing", "ok"),
        ("tool", "ok"),
        ("prompt flow", "ok"),
    ]
    last = told["findings"][-1]["said"]
    assert last == f'Prompt flow lists it as "Phi-3 chat" of phi3-promptflow {__version__}'


@pytest.mark.parametrize(
    ("name", "edit", "check", "said", "fix"),
    [
        (
            POINTS,
            replaced("[package_tools]", "[other]"),
            "entry point",
            "no entry point 'package_tools'",
            "entry_points",
        ),
        (
            YAML,
            None,
            "listing",
            "list_package_tools() lists no tool",
            "package_data",
        ),
        pytest.param(
            POINTS,
            replaced("list_package_tools", "list_tools"),
            "entry point",
            "the entry point names phi3_tool.registry:list_tools, and there is no such function",
            "correct the entry point",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            POINTS,
            replaced("phi3_tool.registry", "phi3_tool.listing"),
            "entry point",
            "cannot import phi3_tool.listing: ModuleNotFoundError",
            "setup.py",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            YAML,
            replaced("name: Phi-3 chat", "name: [Phi-3 chat"),
            "listing",
            "cannot run phi3_tool.registry:list_package_tools(): ParserError",
            "look at phi3_tool.registry",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            YAML,
            replaced("function: phi3_chat", "function: phi3_talk"),
            "tool",
            "phi3_tool.chat has no function 'phi3_talk'",
            "`function` in the tool's YAML",
            marks=pytest.mark.slow,
        ),
        (
            CHAT,
            replaced("import logging\n", "import logging\nimport not_installed\n"),
            "tool",
            "cannot import phi3_tool.chat: ModuleNotFoundError: No module named 'not_installed'",
            "install what is missing",
        ),
        pytest.param(
            REGISTRY,
            listing_only_once,
            "prompt flow",
            "Prompt flow does not list phi3_tool.chat.phi3_chat",
            "pf tool list",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fault_is_named_with_its_fix(
    installed: Path, tmp_path: Path, name: str, edit: Edit | None, check: str, said: str, fix: str
) -> None:
    place = spoilt_place(installed, tmp_path, {name: edit})
    (found,) = faults(list(search(Path(sys.executable), place)))
    assert found.check == check
    assert said in found.said
    assert fix in found.fix


def test_a_package_without_the_tool_does_not_find_another_copy(
    installed: Path, tmp_path: Path
) -> None:
    """This environment has the project installed too; that copy must not stand in."""
    place = spoilt_place(installed, tmp_path, {})
    shutil.rmtree(place / "phi3_tool")
    (found,) = faults(list(search(Path(sys.executable), place)))
    assert "cannot import phi3_tool.registry" in found.said


def test_a_wheel_that_does_not_install_is_named(wheel: Path, tmp_path: Path) -> None:
    foreign = tmp_path / wheel.name.replace("py3-none", "cp27-none")
    shutil.copy(wheel, foreign)
    with pytest.raises(StageError, match=r"The wheel cannot be installed: .*not a supported wheel"):
        install_alone(foreign, tmp_path)


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    project = tmp_path / "clone"
    for name in ("flows", "connections", "training/recipes", "training/data"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    (gone,) = check_tool(project)
    assert (gone.check, gone.state) == ("build", State.FAULT)
    assert "tools is missing" in gone.said
    for name in ("tools/phi3_tool", "agents/phi3_agent", "training/phi3_training"):
        (project / name).mkdir(parents=True)
    with pytest.raises(StageError, match=r"The wheel cannot be built: .*phi3_tool/__init__\.py"):
        build(project, tmp_path)


def test_the_clone_stays_as_it_was(wheel: Path) -> None:
    assert not list(ROOT.glob("build")), "the wheel is built from a copy"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {"phi3_tool", "phi3_agent", "phi3_training"}
    assert tops == {*packages, INFO}
    assert not [name for name in names if "__pycache__" in name]
