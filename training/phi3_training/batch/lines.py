"""The lines of a batch: read from a JSONL file, every fault of it named at once; writes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SHOWN_FAULTS, UsageError

# What the flow takes besides the question; a null counts as not given.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "chat_history": ((list,), "a list of turns"),
    "system_prompt": ((str,), "text"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "max_new_tokens": ((int,), "a whole number"),
}


@dataclass(frozen=True)
class Line:
    """One line of the data: its number, as `pf run` counts (from 0), and its columns."""

    number: int
    columns: Mapping[str, Any]
    turns: int = 0


def read_lines(path: Path, renamed: Mapping[str, str]) -> list[Line]:
    """The lines of a JSONL file, `renamed` columns given the flow's names; all faults at once."""
    faults: list[str] = []
    lines: list[Line] = []
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    for place, text in enumerate(texts, 1):
        if not text.strip():
            continue
        columns = _columns(text, renamed)
        if isinstance(columns, str):
            faults.append(f"{path}:{place}: {columns}")
        else:
            lines.append(Line(len(lines), columns))
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = "\n  ".join([*faults[:SHOWN_FAULTS], *([f"… and {more} more"] if more > 0 else [])])
        raise UsageError(f"{path} cannot be asked, nothing was sent:\n  {shown}")
    if not lines:
        raise UsageError(f"{path} has no lines")
    return lines


def _columns(text: str, renamed: Mapping[str, str]) -> dict[str, Any] | str:
    """The columns of a line, or what is wrong with it."""
    try:
        columns = json.loads(text)
    except ValueError:
        return "not JSON"
    if not isinstance(columns, dict):
        return "not a JSON object"
    absent = [theirs for theirs in renamed.values() if theirs not in columns]
    if absent:
        return f"no column {', '.join(absent)}"
    columns = {**columns, **{ours: columns[theirs] for ours, theirs in renamed.items()}}
    question = columns.get("input_data")
    if not isinstance(question, str) or not question.strip():
        return "no text in the column input_data (name another with --map input_data=COLUMN)"
    wrong = [
        f"{name} must be {what}, not {columns[name]!r:.40}"
        for name, (kinds, what) in _TYPES.items()
        if columns.get(name) is not None
        and (not isinstance(columns[name], kinds) or isinstance(columns[name], bool))
    ]
    return "; ".join(wrong) or columns
