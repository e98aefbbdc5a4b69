"""The answers of a batch: a JSONL file that loses nothing when its writer is killed.

Appends to OUT as answers come and puts it in order at the end; OUT.batch.json beside it says what
was asked, without a key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..run import sha256_of, write_atomically
from .lines import Line

Row = dict[str, Any]


class Answers:
    """OUT: what an earlier batch left in it, and what is appended to it now."""

    def __init__(self, path: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._record = path.with_name(path.name + ".batch.json")
        self._rows: dict[int, Row] = {}
        if path.exists() and not resume:
            raise UsageError(
                f"{path} is there already; do what it lacks with --resume, or write elsewhere with "
                "--out FILE"
            )
        if path.exists():
            self._go_on(asked)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._record, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")
        # Whatever lies there now is whole: a cut last line, as a killed process leaves it, is not.
        self._write_in_order()
        self._stream = path.open("a", encoding="utf-8")

    def has(self, line: Line) -> bool:
        """Whether the line was answered before."""
        return line.number in self._rows

    def add(self, row: Row) -> None:
        """Append a row; it is with the system when this returns, whatever becomes of us."""
        self._stream.write(_text_of(row))
        self._stream.flush()
        self._rows[row["line_number"]] = row

    def close(self) -> None:
        """Put all rows in the order of the data."""
        self._stream.close()
        self._write_in_order()

    def _write_in_order(self) -> None:
        write_atomically(self.path, "".join(_text_of(self._rows[n]) for n in sorted(self._rows)))

    def _go_on(self, asked: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UsageError(
                f"{self.path} has no {self._record.name} beside it, so it was not written by "
                "`phi3 batch`; write elsewhere with --out FILE"
            ) from None
        changed = [name for name in asked if before.get(name) != asked[name]]
        if changed:
            raise UsageError(
                f"{self.path} was begun with other {', '.join(changed)}: its answers would not "
                "go together; write elsewhere with --out FILE"
            )
        for text in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            row = _row_in(text)
            if row is not None and not row.get("error"):
                self._rows[row["line_number"]] = row


def _text_of(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _row_in(text: str) -> Row | None:
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("line_number"), int) else None


def asked_of(
    data: Path,
    renamed: Mapping[str, str],
    defaults: Mapping[str, Any],
    endpoint: str,
    details: bool,
) -> dict[str, Any]:
    """What a batch is known again by; no secret is part of it."""
    return {
        "data": sha256_of(data),
        "columns": dict(renamed),
        "parameters": dict(defaults),
        "endpoint": endpoint,
        "details": details,
    }
