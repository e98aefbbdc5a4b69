"""The README tells the truth: its commands exist, its files are there, its recipe runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phi3_training.cli import main

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted([PROJECT / "README.md", *PROJECT.glob("docs/*.md"), *PROJECT.glob("*/*/README.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
COMMAND = re.compile(r"(?:\.venv/bin/)?phi3 ([a-z]+)")
TARGET = re.compile(r"\bmake ([a-z]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


def test_make_targets_exist() -> None:
    named = set(TARGET.findall((PROJECT / "README.md").read_text("utf-8")))
    makefile = (PROJECT / "Makefile").read_text("utf-8")

    assert {"up", "test", "down"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def _typed_commands() -> list[str]:
    blocks = [
        block
        for page in PAGES
        for block in re.findall(
            r"```bash\n(.*?)```|`([^`\n]+)`", page.read_text("utf-8"), re.DOTALL
        )
    ]
    return sorted(set(COMMAND.findall("\n".join("\n".join(block) for block in blocks))))


@pytest.mark.parametrize("command", _typed_commands())
def test_phi3_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])

    assert ended.value.code == 0
    assert "usage: phi3" in capsys.readouterr().out


def test_pages_name_commands() -> None:
    assert {"up", "chat", "data", "env", "down"} <= set(_typed_commands())
