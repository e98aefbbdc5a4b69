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


# Prompt flow gives an evaluation only the lines that have an answer: a run half of which failed
# would look perfect. So its own record is read.
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
                row = json.loads(text)
                info = row["run_info"]
                error = ""
                if info.get("status") != "Completed":
                    error = (info.get("error") or {}).get("message") or "no reason given"
                try:
                    # Python 3.10's fromisoformat does not know the Z.
                    start, end = (
                        datetime.fromisoformat(info[key].replace("Z", "+00:00"))
                        for key in ("start_time", "end_time")
                    )
                    seconds = (end - start).total_seconds()
                except (AttributeError, KeyError, TypeError, ValueError):  # a line that never ran
                    seconds = None
                found[row["line_number"]] = LineRecord(row["line_number"], seconds, error)
    return [found[number] for number in sorted(found)] or None


def runs_are_kept_here() -> bool:
    """Whether Prompt flow keeps its runs on this machine, as it does outside the cloud."""
    return _runs().is_dir()


def _runs() -> Path:
    home = os.environ.get("PF_HOME_DIRECTORY") or Path.home() / ".promptflow"
    return Path(home) / ".runs"
