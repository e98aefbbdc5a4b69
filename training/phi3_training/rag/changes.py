"""Documents that change after tuning: an index with some facts edited, and no model trained again.

Reads a JSON list of changes; writes a copy of an index. Only passages that change get new vectors.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi3_tool.index import DocumentIndex, Embedder

from ..errors import UsageError
from .cutting import Passage

_KEYS = ("id", "file", "old", "new", "answer")


@dataclass(frozen=True)
class FactChange:
    """`old` becomes `new` in a document; the question `id` then has the answer `answer`."""

    id: str
    file: str
    old: str
    new: str
    answer: str


def read_changes(path: Path) -> list[FactChange]:
    """The changes of a file. Raises UsageError with every fault."""
    expected = "expected a JSON list of objects with the texts " + ", ".join(_KEYS)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); {expected}") from None
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{path}: {expected}")
    faults = []
    for number, row in enumerate(rows, 1):
        values = row if isinstance(row, dict) else {}
        texts = {key: text for key, text in values.items() if isinstance(text, str)}
        missing = [key for key in _KEYS if not texts.get(key, "").strip()]
        if missing:
            faults.append(f"  number {number}: no text under {', '.join(missing)}")
    if faults:
        raise UsageError(f"{path}: {expected}\n" + "\n".join(faults))
    return [FactChange(**{key: row[key] for key in _KEYS}) for row in rows]


def changed_index(
    index: DocumentIndex,
    embedder: Embedder | None,
    changes: Sequence[FactChange],
    target: Path,
) -> DocumentIndex:
    """A copy of the index at `target` with the changes made in its passages.

    White space need not agree: a PDF breaks lines where it likes. Raises UsageError with every
    change whose text is in no passage of its document.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.new")
    scratch.unlink(missing_ok=True)
    with closing(sqlite3.connect(index.path, isolation_level=None)) as database:
        database.execute("VACUUM INTO ?", (str(scratch),))
    lost = []
    with closing(sqlite3.connect(scratch)) as database:
        touched: set[int] = set()
        for change in changes:
            old = re.compile(r"\s+".join(map(re.escape, change.old.split())))
            matching = {
                number: text
                for number, text in database.execute(
                    "SELECT passage.id, text FROM passage JOIN document ON document.id = document "
                    "WHERE path = ?",
                    (change.file,),
                )
                if old.search(text)
            }
            if not matching:
                lost.append(f'  {change.id}: no passage of {change.file} has "{change.old}"')
            for number, text in matching.items():
                # A function: in a plain replacement a backslash of the new text would be a command.
                edited = old.sub(lambda _, new=change.new: new, text)  # type: ignore[misc]
                database.execute("UPDATE passage SET text = ? WHERE id = ?", (edited, number))
            touched.update(matching)
        if embedder is not None:
            numbers = sorted(touched)
            rows = [
                database.execute("SELECT heading, text FROM passage WHERE id = ?", (n,)).fetchone()
                for n in numbers
            ]
            searched = [Passage(text, heading, None, 0, 0).searched for heading, text in rows]
            vectors = embedder.embed(searched).astype(np.float16) if rows else ()
            database.executemany(
                "UPDATE passage SET vector = ? WHERE id = ?",
                [(vector.tobytes(), n) for vector, n in zip(vectors, numbers, strict=True)],
            )
        database.execute("INSERT INTO words(words) VALUES('rebuild')")
        database.commit()
    if lost:
        scratch.unlink()
        raise UsageError("These changes do not fit the indexed documents:\n" + "\n".join(lost))
    # Whole or not at all: an index half of whose facts are changed would mislead the comparison.
    scratch.replace(target)
    return DocumentIndex(target)
