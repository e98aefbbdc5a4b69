"""The record that Prompt flow keeps of a run on this machine: each line, its time, its error.

Reads <Prompt flow's home>/.runs/<name>/flow_artifacts/*.jsonl; None where there is no such run.
"""

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Optional

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class LineRecord(NamedTuple):
    """What became of one line of a run."""

    number: int
    seconds: Optional[float]
    error: str


def record_of(name: str) -> Optional[list]:
    """Every line of the run, in order."""
    if not _NAME.fullmatch(name):
        return None
    files = sorted((_runs() / name / "flow_artifacts").glob("*.jsonl"))
    found = {}
    for path in files:
        # By line feeds alone: a text may hold other signs that Python takes for an end of line.
        for text in path.read_text(encoding="utf-8").split("\n"):
            if text.strip():
                line = _line_in(json.loads(text))
                found[line.number] = line
    return [found[number] for number in sorted(found)] or None


def runs_are_kept_here() -> bool:
    """Whether Prompt flow keeps its runs on this machine, as it does outside the cloud."""
    return _runs().is_dir()


def _runs() -> Path:
    home = os.environ.get("PF_HOME_DIRECTORY") or Path.home() / ".promptflow"
    return Path(home) / ".runs"


def _line_in(row: dict) -> LineRecord:
    info = row["run_info"]
    failed = info.get("status") != "Completed"
    message = (info.get("error") or {}).get("message") or "no reason given"
    return LineRecord(row["line_number"], _seconds(info), message if failed else "")


def _seconds(info: dict) -> Optional[float]:
    try:
        start, end = (_moment(info[key]) for key in ("start_time", "end_time"))
    except (KeyError, TypeError, ValueError):
        return None
    return (end - start).total_seconds()


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
