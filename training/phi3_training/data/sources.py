"""Where chats come from: files of several kinds, folders of them, or a set of the hub."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import MissingExtraError
from ..recipe.sections import HUB, HubSet
from ..run import fingerprint, sha256_of
from .digest import Digest, Digester
from .documents import Raw, document_rows, is_document
from .faults import Problem
from .folders import Folder, expand_folder
from .formats import carried, read_row
from .jsonl import Chunk, Line, Range, Sound, StrictJson, accept, chunks, decode
from .opening import PLAIN, BrokenFileError, Encoding, Note, encoding_of, open_text
from .tables import column_rows, csv_rows, without_nulls

# One block of rows, read, checked and digested: the unit of work of one process.
# Reads a range of bytes of a JSON lines file, or rows that another reader gives; writes the sound
# rows to block files.

BLOCK = 1 << 23
CRLF, SEPARATOR = "crlf", "separator"
# U+2028, U+2029 and NEL, which JSON allows in texts.
_SEPARATORS = (b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85")


def digest_range(source: Path, part: Range, path: Path) -> Digest:
    """Read the lines that start in a range of a JSON lines file; the rows go to `path`."""
    with source.open("rb") as stream:
        return next(_digests(stream, part, iter([path]), copy=False))


def digest_packed(source: Path, encoding: Encoding, folder: Path, name: str) -> Iterator[Digest]:
    """The same for JSON lines that are packed or not UTF-8, in blocks, unpacked on the way."""
    paths = (folder / f"{name}-{number:05}.jsonl" for number in count())
    with open_text(source, encoding) as stream:
        yield from _digests(stream, Range(0, sys.maxsize), paths, copy=True)


def _digests(
    stream: BinaryIO, part: Range, paths: Iterator[Path], *, copy: bool
) -> Iterator[Digest]:
    found = chunks(stream, part)
    more = True
    while more:
        more = False
        digester = Digester(next(paths))
        with digester.digest.path.open("wb") as rows:
            strict = _Strict(digester.digest, at_start=part.start == 0)
            try:
                for chunk in found:
                    _digest_chunk(chunk, digester, strict, rows, copy=copy)
                    if copy and digester.written > BLOCK:
                        more = True
                        break
            except BrokenFileError as error:
                digester.digest.fault(digester.digest.lines + 1, error.problem)
                digester.digest.filled = True
        yield digester.finish()


def _digest_chunk(
    chunk: Chunk, digester: Digester, strict: _Strict, rows: BinaryIO, *, copy: bool
) -> None:
    offset, number = chunk.offset, digester.digest.lines
    _note_lines(chunk, digester.digest)
    for index, sound in enumerate(accept(chunk)):
        number += 1
        size = len(chunk.lines[index])
        if sound is None:
            sound = strict.read(chunk.line(index, number, offset))
        if sound is not None:
            if copy and sound.written is None:
                sound = sound._replace(written=chunk.lines[index])
            digester.take(number, sound, offset, size, rows)
        offset += size + 1
    digester.digest.lines = number


def _note_lines(chunk: Chunk, digest: Digest) -> None:
    """Count line ends of Windows, and what other programs take for line ends inside of texts."""
    # One byte is found ten times as fast as two or three, and few files have any of them.
    if b"\r" in chunk.text:
        digest.notes[CRLF] += sum(line.endswith(b"\r") for line in chunk.lines)
    if not chunk.text.isascii() and any(mark in chunk.text for mark in _SEPARATORS):
        digest.notes[SEPARATOR] += sum(
            any(mark in line for mark in _SEPARATORS) for line in chunk.lines
        )


def digest_rows(raws: Iterable[Raw], folder: Path, name: str) -> Iterator[Digest]:
    """The same for rows of other kinds of files, in blocks; `line` numbers are the file's own."""
    rows = iter(raws)
    number, more, last = 0, True, 0
    while more:
        more = False
        digester = Digester(folder / f"{name}-{number:05}.jsonl")
        number += 1
        with digester.digest.path.open("wb") as stream:
            try:
                for raw in rows:
                    last = raw.line
                    found = _sound_or_problems(raw.value, raw.problems)
                    if isinstance(found, Sound):
                        digester.take(raw.line, found, 0, 0, stream, raw.row)
                    else:
                        for problem in found:
                            digester.digest.fault(raw.line, problem, raw.row)
                    digester.digest.filled = True
                    if digester.written > BLOCK:
                        more = True
                        break
            except BrokenFileError as error:
                digester.digest.fault(last, error.problem)
                digester.digest.filled = True
        yield digester.finish()


class _Strict:
    """Reads the lines that are not plainly sound, and notes all that is wrong with them."""

    def __init__(self, digest: Digest, *, at_start: bool) -> None:
        self._digest = digest
        self._at_start = at_start
        self._json = StrictJson()

    def read(self, line: Line) -> Sound | None:
        """The line's row, if it is sound."""
        if self._at_start and line.offset == 0:
            line = line._replace(data=line.data.removeprefix(codecs.BOM_UTF8))
        if line.is_blank:
            return None
        self._digest.filled = True
        found = self._row(line)
        if isinstance(found, Sound):
            return found
        for problem in found:
            self._digest.fault(line.number, problem)
        return None

    def _row(self, line: Line) -> Sound | list[Problem]:
        text, problems = decode(line)
        if text is None:
            return problems
        return _sound_or_problems(*self._json.read(text))


def _sound_or_problems(value: Any, problems: list[Problem]) -> Sound | list[Problem]:
    """A row that was read strictly: sound, or all that is wrong with it."""
    if not isinstance(value, dict):
        kinds = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
        what = f"the line is {kinds.get(type(value), 'a number')}, not an object"
        return problems or [Problem("not-an-object", what, 'write {"messages": […]}')]
    row = read_row(value)
    extra, wrong = carried(value)
    problems = [*problems, *row.problems, *wrong]
    if problems or row.form is None:
        return problems
    return Sound.of(row, extra)


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

    def rows(self, note: Note) -> Iterator[Raw]:
        """The rows of a source that is not JSON lines."""
        if isinstance(self.source, HubSet):
            return hub_rows(self.source)
        if self.kind == "columns":
            return column_rows(self.source)
        if self.kind == "csv":
            return csv_rows(self.source, note)
        self.encoding.tell(note)
        if self.kind == "document":
            return document_rows(self.source, self.encoding, note)
        return line_rows(self.source, self.encoding)


def rows_of(source: Source, note: Note = no_note) -> Iterator[Raw]:
    """The rows of any source, of whatever kind, before they are read as chats.

    Each has its line (and its number, where lines do not tell rows apart), and problems in place
    of a value where it cannot be read; a problem of the whole file has line 0. `note` is given
    what a person should know of the file. Raises OSError.
    """
    line = 0
    try:
        for raw in Reading.of(source).rows(note):
            line = raw.line
            yield raw
    except BrokenFileError as error:
        yield Raw(line, None, [error.problem])


def line_rows(path: Path, encoding: Encoding) -> Iterator[Raw]:
    """The rows of JSON lines; blank lines are skipped."""
    strict, number = StrictJson(), 0
    with open_text(path, encoding) as stream:
        for chunk in chunks(stream, Range(0, sys.maxsize)):
            for index in range(len(chunk.lines)):
                number += 1
                line = chunk.line(index, number, 0)
                if not line.is_blank:
                    text, problems = decode(line)
                    value, found = (None, problems) if text is None else strict.read(text)
                    yield Raw(number, value, found)


def stamp(source: Source) -> str:
    """The hash of a source; a set of the hub has none."""
    return hash_of(source) if isinstance(source, Path) else ""


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
        for one in expand(source).all:
            found.append(hash_of(one) if isinstance(one, Path) else fingerprint(str(one)))
    return found
