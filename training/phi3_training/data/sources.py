"""Where chats come from: files of several kinds, folders of them, or a set of the hub."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ..errors import MissingExtraError
from ..recipe.sections import HUB, HubSet
from ..run import fingerprint, sha256_of
from .documents import Raw, document_rows, is_document
from .faults import Problem
from .folders import Folder, expand_folder
from .jsonl import Range, StrictJson, lines_of, note_line_ends
from .opening import PLAIN, BrokenFileError, Encoding, Note, encoding_of, open_text
from .tables import column_rows, csv_rows, without_nulls

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
    try:
        rows = datasets.load_dataset(source.name, split=source.split, revision=source.revision)
    except kinds as error:
        yield Raw(0, None, [_unreachable(source, error)])
        return
    for number, row in enumerate(rows, start=1):
        yield Raw(number, without_nulls(row), [], number)


def _unreachable(source: HubSet, error: Exception) -> Problem:
    why = " ".join(str(error).split())[:200]
    folder = Path(source.name)
    if folder.is_dir():
        return Problem(
            "hub-set", f"the folder cannot be read as a data set ({why})", "check its files"
        )
    return Problem(
        "hub-set",
        f"could not download the data set from the Hugging Face hub: {type(error).__name__}: {why}",
        "check its name, its split and the network (HF_HUB_OFFLINE, proxy, HF_TOKEN for gated "
        "data sets), or download it and name the files",
    )


Source = Path | HubSet
Kind = Literal["lines", "document", "csv", "columns", "hub"]


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
        last = 0
        try:
            for raw in self._rows(note, line_ends):
                yield raw
                last = raw.line
        except BrokenFileError as error:
            yield Raw(last, None, [error.problem])

    def _rows(self, note: Note, line_ends: Counter[str] | None) -> Iterator[Raw]:
        if isinstance(self.source, HubSet):
            return hub_rows(self.source)
        if self.kind == "columns":
            return column_rows(self.source)
        if self.kind == "csv":
            return csv_rows(self.source, note)
        self.encoding.report(note)
        if self.kind == "document":
            return document_rows(self.source, self.encoding, note)
        return line_rows(self.source, self.encoding, line_ends)


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


@lru_cache(64)
def _hash_at(path: Path, _inode: int, _size: int, _moment: int) -> str:
    return sha256_of(path)


def fingerprints(sources: Sequence[Source]) -> list[str]:
    """What the data stage depends on: the bytes of files, the name and split of sets."""
    prints = []
    for source in sources:
        for file in expand(source).all:
            prints.append(hash_of(file) if isinstance(file, Path) else fingerprint(str(file)))
    return prints
