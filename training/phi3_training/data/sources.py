"""Where chats come from: files of several kinds, folders of them, or a set of the hub."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from ..errors import MissingExtraError
from ..recipe.sections import HUB, HubSet
from ..run import fingerprint, sha256_of
from .digest import Digest, Digester
from .faults import Problem
from .formats import JSON_CELLS, carried, read_row
from .jsonl import (
    BOM,
    LINE_LIMIT,
    Chunk,
    Line,
    Range,
    Sound,
    StrictJson,
    accept,
    byte_order_mark,
    chunks,
    decode,
    whole_file_problem,
)

# One block of rows, read, checked and digested: the unit of work of one process.
# Reads a range of bytes of a JSON lines file, or rows that another reader gives; writes the sound
# rows to block files.

BLOCK = 1 << 23


class Raw(NamedTuple):
    """A row as a reader of another kind of file gives it, with what was wrong on the way."""

    line: int
    value: Any
    problems: list[Problem]


def digest_range(source: Path, part: Range, path: Path) -> Digest:
    """Read the lines that start in a range of a JSON lines file; the rows go to `path`."""
    digester = Digester(path)
    with source.open("rb") as stream, path.open("wb") as rows:
        strict = _Strict(digester.digest, at_start=part.start == 0)
        for chunk in chunks(stream, part):
            _digest_chunk(chunk, digester, strict, rows)
            if digester.digest.stop:
                break
    return digester.finish()


def _digest_chunk(chunk: Chunk, digester: Digester, strict: _Strict, rows: BinaryIO) -> None:
    offset, number = chunk.offset, digester.digest.lines
    for index, sound in enumerate(accept(chunk)):
        number += 1
        size = len(chunk.lines[index])
        if sound is None:
            sound = strict.read(chunk.line(index, number, offset))
        if sound is not None:
            digester.take(number, sound, offset, size, rows)
        elif digester.digest.stop:
            break
        offset += size + 1
    digester.digest.lines = number


def digest_rows(raws: Iterable[Raw], folder: Path, name: str) -> Iterator[Digest]:
    """The same for rows of other kinds of files, in blocks; `line` numbers are the file's own."""
    rows = iter(raws)
    number, more = 0, True
    while more:
        more = False
        digester = Digester(folder / f"{name}-{number:05}.jsonl")
        number += 1
        with digester.digest.path.open("wb") as stream:
            for raw in rows:
                found = _sound_or_problems(raw.value, raw.problems)
                if isinstance(found, Sound):
                    digester.take(raw.line, found, 0, 0, stream)
                else:
                    digester.digest.faults += [(raw.line, problem) for problem in found]
                digester.digest.filled = True
                if digester.written > BLOCK:
                    more = True
                    break
        yield digester.finish()


class _Strict:
    """Reads the lines that are not plainly sound, and notes all that is wrong with them."""

    def __init__(self, digest: Digest, *, at_start: bool) -> None:
        self._digest = digest
        self._at_start = at_start
        self._json = StrictJson()

    def read(self, line: Line) -> Sound | None:
        """The line's row, if it is sound."""
        if self._at_start and line.number == 1:
            if problem := whole_file_problem(line):
                self._digest.stop = True
                self._digest.fault(0, problem)
                return None
            if line.data.startswith(BOM):
                self._digest.fault(1, byte_order_mark())
                line = line._replace(data=line.data.removeprefix(BOM))
        if line.data.endswith(b"\r"):
            self._digest.add_crlf(line.number)
        if line.is_blank:
            self._digest.add_blank(line.number)
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


# A JSON file that is one array of rows, read row by row: memory holds one row, not the file.

_CHUNK = 1 << 16
_SPACES = " \t\r\n"


def is_array(path: Path) -> bool:
    """Whether the first character of a file that is not a space opens an array."""
    try:
        with path.open("rb") as stream:
            return stream.read(_CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return False


def array_rows(path: Path) -> Iterator[Raw]:
    """The elements of the array, each with the line that it starts on."""
    with path.open(encoding="utf-8-sig") as stream:
        try:
            yield from _Elements(stream).read()
        except UnicodeDecodeError:
            problem = Problem("not-utf8", "the file is not UTF-8", "save the file as UTF-8")
            yield Raw(0, None, [problem])


class _Elements:
    """Walks over the text of an array with a window of limited size."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._place = 0
        self._line = 1
        self._json = StrictJson()

    def read(self) -> Iterator[Raw]:
        """All elements; what breaks the array ends the reading."""
        self._peek()
        self._place += 1  # the bracket
        if self._peek() == "]":
            self._place += 1
            yield from self._end()
            return
        while True:
            self._peek()
            line = self._line
            value, problems, end = self._element()
            yield Raw(line, value, problems)
            if end is None:
                return
            self._go_to(end)
            mark = self._peek()
            self._place += 1
            if mark == "]":
                yield from self._end()
                return
            if mark != ",":
                where = "at the end of the file" if not mark else f"near {mark!r}"
                what = f"the JSON array is broken {where}; the rest was not read"
                fix = "write rows with commas between them, and ] at the end"
                yield Raw(self._line, None, [Problem("broken-json", what, fix)])
                return

    def _end(self) -> Iterator[Raw]:
        if self._peek():
            what = "there is text after the JSON array"
            yield Raw(self._line, None, [Problem("broken-json", what, "remove it")])

    def _element(self) -> tuple[object, list[Problem], int | None]:
        while True:
            value, problems, end = self._json.read_at(self._text, self._place)
            whole = end is not None and end < len(self._text)
            if whole or len(self._text) - self._place > LINE_LIMIT or not self._more():
                break
        if end is None:
            problems = [problems[0]._replace(column=None)]
            if len(self._text) - self._place > LINE_LIMIT:
                what = f"the row is broken or larger than {LINE_LIMIT >> 20} MiB"
                problems = [Problem("line-too-long", what, "split the conversation")]
        return value, problems, end

    def _peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            start = self._place
            while start < len(self._text) and self._text[start] in _SPACES:
                start += 1
            self._go_to(start)
            if start < len(self._text):
                return self._text[start]
            if not self._more():
                return ""

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _more(self) -> bool:
        chunk = self._stream.read(max(_CHUNK, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)


# Chats in tables, CSV and parquet: a column for each key of a format; `messages` may be JSON.

_BATCH = 256


def csv_rows(path: Path) -> Iterator[Raw]:
    """The rows of a CSV or TSV file, whose first line names the columns."""
    csv.field_size_limit(LINE_LIMIT)
    tabs = path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if tabs else ",", strict=True)
        try:
            yield from _named(reader)
        except UnicodeDecodeError:
            fix = "save the file as UTF-8"
            yield Raw(0, None, [Problem("not-utf8", "the file is not UTF-8", fix)])
        except csv.Error as error:
            what = "broken CSV; the rest was not read"
            fix = 'put texts with commas, quotes or line breaks in quotes, and double each "'
            yield Raw(reader.line_num, None, [Problem("broken-csv", f"{what} ({error})", fix)])


def _named(reader: Any) -> Iterator[Raw]:
    names = next(reader, None)
    if names is None:
        return
    if repeated := [name for name in names if names.count(name) > 1]:
        problem = Problem(
            "repeated-key",
            f"the column {repeated[0]!r} occurs twice",
            "keep one of them: it is undefined which one counts",
        )
        yield Raw(1, None, [problem])
        return
    json = StrictJson()
    line = reader.line_num + 1
    for values in reader:
        start, line = line, reader.line_num + 1
        if not values:
            continue
        if len(values) != len(names):
            what = f"the row has {len(values)} columns, the header has {len(names)}"
            fix = "write a value, or nothing between commas, for each column"
            yield Raw(start, None, [Problem("broken-csv", what, fix)])
            continue
        yield _row(start, dict(zip(names, values, strict=True)), json)


def _row(line: int, cells: dict[str, str], json: StrictJson) -> Raw:
    """An empty cell is a key that is not there; lists of messages are JSON in their cell."""
    row: dict[str, Any] = {key: value for key, value in cells.items() if value}
    problems: list[Problem] = []
    for key in JSON_CELLS & row.keys():
        if not row[key].lstrip().startswith("["):
            continue
        row[key], found = json.read(row[key])
        problems += [problem._replace(column=None) for problem in found]
        if row[key] is None:
            return Raw(line, None, problems)
    return Raw(line, row, problems)


def parquet_rows(path: Path) -> Iterator[Raw]:
    """The rows of a parquet file, counted from 1."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "local") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Raw(number, {k: v for k, v in row.items() if v is not None}, [])
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:120]
        problem = Problem(
            "broken-parquet", f"not a complete parquet file ({why})", "write the file again"
        )
        yield Raw(number + 1 if number else 0, None, [problem])


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
        yield Raw(number, {key: value for key, value in row.items() if value is not None}, [])


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
