"""Where chats come from: files of several kinds, folders of them, or a set of the hub.

In a folder, names mean what they mean to `datasets.load_dataset` of Hugging Face: hidden files do
not count, `train`, `validation` and `test` in the name of a file or folder are splits, and where a
file is named for training, those without a split are not read. A folder of `datasets.save_to_disk`
is its Arrow files.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ..errors import MissingExtraError
from ..recipe.sections import HUB, HubSet
from ..run import fingerprint, sha256_of
from . import faults
from .jsonl import Range, StrictJson, lines_of, note_line_ends
from .readers import (
    PLAIN,
    BrokenFileError,
    Encoding,
    Note,
    Raw,
    column_rows,
    csv_rows,
    document_rows,
    encoding_of,
    is_document,
    open_text,
    without_nulls,
)

Source = Path | HubSet
Kind = Literal["lines", "document", "csv", "columns", "hub"]

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

    def split_of(path: Path) -> Iterator[str]:
        """The splits that the folders on the way name, then the file: the first one counts."""
        for part in (*path.parts[:-1], path.name):
            yield from (split for split, pattern in _PATTERNS.items() if pattern.search(part))

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
        elif split := next(split_of(inside), None):
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


def source_of(text: Path | str) -> Source:
    """A source as it is typed: `hub:…`, or the path of a file or folder."""
    return HubSet.parse(str(text)) if str(text).startswith(HUB) else Path(text)


def place_of(source: Source) -> Path:
    """How faults name a source."""
    return source if isinstance(source, Path) else Path(str(source))


def expand(source: Source) -> Folder:
    """A folder as the chat files in it, by their split; anything else as it is."""
    if isinstance(source, Path) and source.is_dir():
        return expand_folder(source)
    return Folder({"train": [source]})


def no_note(_text: str) -> None:
    """Takes a note of a file that nobody wants."""


@dataclass(frozen=True)
class Reading:
    """How a source is read: by its name, and JSON by its first characters."""

    source: Source
    kind: Kind
    encoding: Encoding = PLAIN  # of JSON; a table's is found when it is read

    @classmethod
    def of(cls, source: Source) -> Reading:
        """Look at the start of a source. Raises OSError and BrokenFileError."""
        if isinstance(source, HubSet):
            return cls(source, "hub")
        suffixes = [suffix.lower() for suffix in source.suffixes[-2:]]
        if suffixes and suffixes[-1] in (".parquet", ".arrow"):
            with source.open("rb"):
                return cls(source, "columns")
        encoding = encoding_of(source)
        if {".csv", ".tsv"} & set(suffixes):
            return cls(source, "csv", encoding)
        return cls(source, "document" if is_document(source, encoding) else "lines", encoding)

    @property
    def in_ranges(self) -> bool:
        """Whether the file is read in place, from any line on."""
        return self.kind == "lines" and self.encoding.is_plain

    def rows(self, note: Note, line_ends: Counter[str] | None = None) -> Iterator[Raw]:
        """The rows of the source; where it is damaged, the last one holds the problem.

        `line_ends` counts unusual line ends of JSON lines, as the rows are read.
        """
        if isinstance(self.source, HubSet):
            rows = hub_rows(self.source)
        elif self.kind == "columns":
            rows = column_rows(self.source)
        elif self.kind == "csv":
            rows = csv_rows(self.source, note)
        else:
            self.encoding.report(note)
            if self.kind == "document":
                rows = document_rows(self.source, self.encoding, note)
            else:
                rows = line_rows(self.source, self.encoding, line_ends)
        last = 0
        try:
            for raw in rows:
                yield raw
                last = raw.line
        except BrokenFileError as error:
            yield Raw(last, None, [error.problem])


def rows_of(source: Source, note: Note = no_note) -> Iterator[Raw]:
    """The rows of any source, of whatever kind, before they are read as chats.

    Each has its line (and its number, where several rows may share a line), and problems in place
    of a value where it cannot be read; a problem of the whole file has line 0. `note` is given
    what a person should know of the file. Raises OSError.
    """
    try:
        reading = Reading.of(source)
    except BrokenFileError as error:
        yield Raw(0, None, [error.problem])
        return
    yield from reading.rows(note)


def line_rows(
    path: Path, encoding: Encoding, line_ends: Counter[str] | None = None
) -> Iterator[Raw]:
    """The rows of JSON lines; blank lines are skipped. `line_ends` counts unusual line ends."""
    reader = StrictJson()
    with open_text(path, encoding) as stream:
        for line in lines_of(stream, Range(0, sys.maxsize)):
            if line_ends is not None:
                note_line_ends(line, line_ends)
            if not line.is_blank:
                yield Raw(line.number, *reader.read_line(line))


def stamp(source: Source) -> str:
    """The hash of a source; a set of the hub has none."""
    return hash_of(source) if isinstance(source, Path) else ""


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, taken once while the file stays as it is.

    A command asks first whether the stage is done already, then for the manifest of the stage.
    """
    status = path.stat()
    return _hash_at(path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(64)  # its key has what changes with the bytes; a folder of chats has some files
def _hash_at(path: Path, _inode: int, _size: int, _moment: int) -> str:
    return sha256_of(path)


def fingerprints(sources: Sequence[Source]) -> list[str]:
    """What the data stage depends on: the bytes of files, the name and split of sets."""
    prints = []
    for source in sources:
        for file in expand(source).all:
            prints.append(hash_of(file) if isinstance(file, Path) else fingerprint(str(file)))
    return prints


# Sets of the Hugging Face hub, through the `datasets` library: a split, or a share of one.


def hub_rows(source: HubSet) -> Iterator[Raw]:
    """The rows of a set; rows count from 1 in the order of the split."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "local") from None
    datasets.disable_progress_bars()
    # datasets and huggingface_hub raise many kinds of errors; all of them are one of these.
    kinds = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    # Of "train_sft[:1%]" the whole split is downloaded: `datasets` cuts afterwards.
    try:
        rows = datasets.load_dataset(source.name, split=source.split, revision=source.revision)
    except kinds as error:
        why = " ".join(str(error).split())[:200]
        is_folder = Path(source.name).is_dir()
        problem = (
            faults.HUB_FOLDER(why=why)
            if is_folder
            else faults.HUB_SET(error=type(error).__name__, why=why)
        )
        yield Raw(0, None, [problem])
        return
    for number, row in enumerate(rows, start=1):
        yield Raw(number, without_nulls(row), [], number)
