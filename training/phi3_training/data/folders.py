"""The chat files of a folder, by split: which are read and which are not.

Names mean what they mean to `datasets.load_dataset` of Hugging Face: hidden files do not count,
`train`, `validation` and `test` in the name of a file or folder are splits, and where a file is
named for training, those without a split are not read. A folder of `datasets.save_to_disk` is its
Arrow files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sources import Source

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet", ".arrow")
# Files that come with a hub data set, or with `save_to_disk`.
_ABOUT = {
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
}
# datasets.data_files.SPLIT_KEYWORDS, and what may come next to them: NON_WORDS_CHARS.
_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_PATTERNS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:$|[-._ 0-9])", re.IGNORECASE)
    for split, words in _SPLITS.items()
}
_NAMED = 5  # files of a kind that a note names


@dataclass(frozen=True)
class Folder:
    """The files of a source by split (train, validation, test), and those that are not read."""

    splits: dict[str, list[Source]]
    unread: list[tuple[str, list[str]]] = field(default_factory=list)  # why, names

    @property
    def all(self) -> list[Source]:
        """The files of all splits."""
        return [source for sources in self.splits.values() for source in sources]

    def notes(self) -> list[str]:
        """What is not read, and why."""
        return [f"not read, {why}: {named(names)}" for why, names in self.unread]


def named(names: Sequence[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def expand_folder(folder: Path) -> Folder:
    """The chat files in a folder and in the folders in it, in the order of their names."""
    splits: dict[str, list[Source]] = {"train": [], "validation": [], "test": []}
    plain: list[Source] = []
    hidden, other = [], []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        inside = path.relative_to(folder)
        name = inside.as_posix()
        if any(part.startswith((".", "__")) for part in inside.parts):
            hidden.append(name)
        elif path.name in _ABOUT or not path.name.lower().endswith(SUFFIXES):
            other.append(name)
        elif split := _split_of(inside):
            splits[split].append(path)
        else:
            plain.append(path)
    unread = []
    if splits["train"] and plain:
        names = [path.relative_to(folder).as_posix() for path in plain if isinstance(path, Path)]
        unread.append(("because other files are named for training", names))
    else:
        splits["train"] = plain or splits["train"]
    unread += [("hidden", hidden)] if hidden else []
    unread += [("not chat files by their names", other)] if other else []
    return Folder(splits, unread)


def _split_of(path: Path) -> str | None:
    """The split that a folder on the way names, else the file."""
    for part in (*path.parts[:-1], path.name):
        for split, pattern in _PATTERNS.items():
            if pattern.search(part):
                return split
    return None
