"""Where each prepared row stands in the user's own files, so that messages can name that place.

Reads and writes run/data-origins.json; sets of more than a bound of rows have none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..run import write_atomically

FILE = "data-origins.json"
MOST_ROWS = 20_000  # about 1 MB


def write_origins(path: Path, places: Mapping[str, Sequence[tuple[Path, int]]]) -> None:
    """Write the file and line of each row of each part; none where there are too many rows."""
    if not 0 < sum(map(len, places.values())) <= MOST_ROWS:
        path.unlink(missing_ok=True)
        return
    rows = {part: [f"{file}:{line}" for file, line in found] for part, found in places.items()}
    write_atomically(path, json.dumps(rows, ensure_ascii=False))


def origins(run: Path, part: str) -> list[str]:
    """`file:line` for each row of a part, in order; empty where that is not known."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8")).get(part, [])
    except (OSError, ValueError, AttributeError):
        return []
    return [str(place) for place in found]
