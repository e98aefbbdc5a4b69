"""A user's own rows for the comparison: read as `phi3 batch` reads them, asked in every way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..batch import INPUTS, read_lines
from .golden import GoldenRow


def own_rows(path: Path, renamed: Mapping[str, str] | None = None) -> list[GoldenRow]:
    """Each row whole by /score, and streamed in OpenAI's dialect; raises UsageError for a fault."""
    rows = []
    for line in read_lines(path, renamed or {}):
        inputs: dict[str, Any] = {
            name: line.columns[name] for name in INPUTS if line.columns.get(name) is not None
        }
        # Counted from 1, as an editor shows them.
        name = f"row {line.number + 1}"
        rows.append(GoldenRow(name, inputs))
        rows.append(GoldenRow(f"{name}, streamed", inputs, stream=True, dialect="openai"))
    return rows
