"""What a person sees on a narrow terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from phi3_training import console


def test_a_table_wraps_where_the_terminal_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "out", Console(width=40, highlight=False, soft_wrap=True))

    console.table("Title", ["questions", "before"], [["word " * 20 + "last", "0.0 %"]])

    shown = capsys.readouterr().out
    assert "last" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 40
