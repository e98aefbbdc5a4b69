"""Prompt flow's command line in a separate home: no usage report, no service for traces."""

from __future__ import annotations

from pathlib import Path

PF_MAIN = "from promptflow._cli.pf import main; main()"
_SETTINGS = "telemetry:\n  enabled: false\ntrace:\n  destination: none\n"


def quiet_home(folder: Path) -> Path:
    """Make a Prompt flow home in `folder`: what PF_HOME_DIRECTORY is to name."""
    home = folder / ".promptflow"
    home.mkdir()
    (home / "pf.yaml").write_text(_SETTINGS, encoding="utf-8")
    return home
