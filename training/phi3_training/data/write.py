"""Writes prepared conversations as JSON lines, counted and hashed on the way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Set as AbstractSet
from pathlib import Path
from types import TracebackType

from .conversation import Conversation

_encode = json.JSONEncoder(ensure_ascii=False).encode


class RowWriter:
    """Rows for one file; when the `with` block ends they are on the disk, not only in a cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._stream = path.open("wb")
        self._hash = hashlib.sha256()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._hash.hexdigest()

    def write(self, conversation: Conversation) -> None:
        """Add a conversation."""
        self.write_line(_encode(conversation.to_dict()).encode("utf-8") + b"\n")

    def write_line(self, line: bytes) -> None:
        """Add a line that was written by `write` before."""
        self._stream.write(line)
        self._hash.update(line)
        self.rows += 1


def divide(
    whole: Path, chosen: AbstractSet[int], rest_path: Path, chosen_path: Path
) -> tuple[RowWriter, RowWriter]:
    """Copy a written file's lines into two files: the rest, and those with a chosen number."""
    with (
        whole.open("rb") as lines,
        RowWriter(rest_path) as rest,
        RowWriter(chosen_path) as taken,
    ):
        for number, line in enumerate(lines):
            (taken if number in chosen else rest).write_line(line)
    return rest, taken
