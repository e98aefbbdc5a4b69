"""Where chats come from: files of several kinds, folders of them, or a set of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from ..recipe_data import HUB, HubSet
from ..run import fingerprint, sha256_of
from .blocks import Raw
from .hub import hub_rows
from .json_array import array_rows, is_array
from .tables import csv_rows, parquet_rows

Source = Path | HubSet
_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", ".parquet")
SUFFIXES = (*_LINES, ".json", *_TABLES)


def source_of(text: Path | str) -> Source:
    """A source as it is typed: `hub:…`, or the path of a file or folder."""
    return HubSet.parse(str(text)) if str(text).startswith(HUB) else Path(text)


def place_of(source: Source) -> Path:
    """How faults name a source."""
    return source if isinstance(source, Path) else Path(str(source))


def expand(source: Source) -> list[Source]:
    """A folder as the chat files in it, in the order of their names; anything else as it is."""
    if isinstance(source, Path) and source.is_dir():
        inside = sorted(source.rglob("*"))
        return [path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file()]
    return [source]


def is_lines(path: Path) -> bool:
    """Whether a file is read as JSON lines: by its name, and `.json` by its first character."""
    suffix = path.suffix.lower()
    return suffix not in _TABLES and not (suffix == ".json" and is_array(path))


def rows_of(source: Source) -> Iterator[Raw]:
    """The rows of a source that is not JSON lines."""
    if isinstance(source, HubSet):
        return hub_rows(source)
    suffix = source.suffix.lower()
    if suffix == ".json":
        return array_rows(source)
    return parquet_rows(source) if suffix == ".parquet" else csv_rows(source)


def stamp(source: Source) -> tuple[int, str]:
    """The size of a source, and the hash of a file that is not hashed while it is read.

    Raises OSError for a file that cannot be read.
    """
    if isinstance(source, HubSet):
        return 0, ""
    with source.open("rb"):
        pass
    size = source.stat().st_size
    return size, "" if is_lines(source) else hash_of(source)


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, taken once while the file stays as it is.

    A command asks first whether the stage is done already, then for the manifest of the stage.
    """
    found = path.stat()
    return _hash_at(path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(64)
def _hash_at(path: Path, _inode: int, _size: int, _moment: int) -> str:
    return sha256_of(path)


def fingerprints(sources: Sequence[Source]) -> list[str]:
    """What the data stage depends on: the bytes of files, the name and split of sets."""
    found = []
    for source in sources:
        for one in expand(source):
            found.append(hash_of(one) if isinstance(one, Path) else fingerprint(str(one)))
    return found
