"""Chats in tables, CSV, parquet and Arrow: a column for each key; `messages` may be JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import MissingExtraError
from .documents import Raw
from .faults import Problem
from .formats import JSON_CELLS
from .jsonl import LINE_LIMIT, StrictJson
from .opening import Note, open_text, table_encoding

_BATCH = 256  # rows as Python objects at once: a column of long chats has 6 KB in each
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_rows(path: Path, note: Note) -> Iterator[Raw]:
    """The rows of a CSV or TSV file, whose first line names the columns."""
    csv.field_size_limit(LINE_LIMIT)
    encoding = table_encoding(path, note)
    encoding.report(note)
    with io.TextIOWrapper(open_text(path, encoding), encoding="utf-8", newline="") as stream:
        lines = _Lines(stream)
        delimiter = _delimiter(lines, path, note)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from _named(reader, lines)
        except UnicodeDecodeError:
            fix = "save the file as UTF-8"
            yield Raw(0, None, [Problem("not-utf8", "the file is not UTF-8", fix)])
        except csv.Error as error:
            what = "broken CSV; the rest was not read"
            marks = f"{_DELIMITERS[delimiter]}, quotes or line breaks"
            fix = f'put texts with {marks} in quotes, and double each "'
            line = reader.line_num + lines.skipped
            yield Raw(line, None, [Problem("broken-csv", f"{what} ({error})", fix)])


class _Lines:
    """The lines of a text, a row of them no longer than the limit, so that memory stays flat."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._first: str | None = None
        self.skipped = 0
        self.size = 0  # of the row so far; set to 0 by who takes the row

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._first if self._first is not None else self._stream.readline(LINE_LIMIT + 1)
        self._first = None
        self.size += len(line)
        if self.size > LINE_LIMIT:
            raise csv.Error(f"a row is longer than {LINE_LIMIT >> 20} MiB")
        if not line:
            raise StopIteration
        return line

    def peek(self) -> str:
        """The first line."""
        if self._first is None:
            self._first = self._stream.readline(LINE_LIMIT + 1)
        return self._first

    def skip(self) -> None:
        """Leave out the first line."""
        self._first = None
        self.skipped += 1


def _delimiter(lines: _Lines, path: Path, note: Note) -> str:
    """What is between the columns: what Excel's line `sep=;` says, else what makes most columns."""
    usual = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ","
    delimiter = usual
    try:
        while (first := lines.peek()) and not first.strip():  # an export may begin with blank lines
            lines.skip()
    except UnicodeDecodeError:
        return usual
    if first[:4].lower() == "sep=" and first[4:5] in _DELIMITERS:
        delimiter = first[4]
        lines.skip()
    else:
        columns = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in _DELIMITERS}
        if max(columns.values()) > columns[usual]:
            delimiter = max(columns, key=lambda mark: columns[mark])
    if delimiter != usual:
        note(f"its columns are separated by {_DELIMITERS[delimiter]}")
    return delimiter


def _named(reader: Any, lines: _Lines) -> Iterator[Raw]:
    names = next(reader, None)
    if names is None:
        return
    if repeated := [name for name in names if names.count(name) > 1]:
        problem = Problem(
            "repeated-key",
            f"the column {repeated[0]!r} occurs twice",
            "keep one of them: it is undefined which one counts",
        )
        yield Raw(1 + lines.skipped, None, [problem])
        return
    json = StrictJson()
    line = reader.line_num + 1 + lines.skipped
    for values in reader:
        start, line = line, reader.line_num + 1 + lines.skipped
        lines.size = 0
        if not any(values):
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
        row[key], faults = json.read(row[key])
        problems += [problem._replace(column=None) for problem in faults]
        if row[key] is None:
            return Raw(line, None, problems)
    return Raw(line, row, problems)


def column_rows(path: Path) -> Iterator[Raw]:
    """The rows of a parquet file, or an Arrow file of `datasets.save_to_disk`, counted from 1."""
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtraError("pyarrow", "local") from None
    kind = path.suffix.lower().removeprefix(".")
    number = 0
    try:
        for batch in _batches(path):
            for row in batch.to_pylist():
                number += 1
                yield Raw(number, without_nulls(row), [], number)
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:120]
        what, fix = f"not a complete {kind} file ({why})", "write the file again"
        place = number + 1 if number else 0
        yield Raw(place, None, [Problem(f"broken-{kind}", what, fix)], place)


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix.lower() == ".parquet":
        with parquet.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=_BATCH)
        return
    with pa.memory_map(str(path)) as stream:
        try:
            batches = iter(pa.ipc.open_stream(stream))
        except pa.ArrowInvalid:  # the form with an index, as Feather has it
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, _BATCH):
                yield batch.slice(start, _BATCH)


def without_nulls(value: object) -> object:
    """A row without what is null: columns, and keys of structs, that other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
