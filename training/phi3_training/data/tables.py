"""Chats in tables, CSV and parquet: a column for each key of a format; `messages` may be JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from .blocks import Raw
from .faults import Problem
from .formats import LIST_KEYS
from .lines import LINE_LIMIT
from .strict_json import StrictJson

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
            mend = "save the file as UTF-8"
            yield Raw(0, None, [Problem("not-utf8", "the file is not UTF-8", mend)])
        except csv.Error as error:
            what = "broken CSV, what follows was not read"
            mend = 'put texts with commas, quotes or line ends between quotes, and double each "'
            yield Raw(reader.line_num, None, [Problem("broken-csv", f"{what} ({error})", mend)])


def _named(reader: Any) -> Iterator[Raw]:
    names = next(reader, None)
    if names is None:
        return
    if repeated := [name for name in names if names.count(name) > 1]:
        problem = Problem(
            "repeated-key",
            f"the column {repeated[0]!r} is there twice",
            "keep one of them: which one counts is left to chance",
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
            what = f"the row has {len(values)} columns, the first line names {len(names)}"
            mend = "write a value, or nothing between commas, for each column"
            yield Raw(start, None, [Problem("broken-csv", what, mend)])
            continue
        yield _row(start, dict(zip(names, values, strict=True)), json)


def _row(line: int, cells: dict[str, str], json: StrictJson) -> Raw:
    """An empty cell is a key that is not there; lists of messages are JSON in their cell."""
    row: dict[str, Any] = {key: value for key, value in cells.items() if value}
    problems: list[Problem] = []
    for key in LIST_KEYS & row.keys():
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
        problem = Problem("broken-parquet", f"not a whole parquet file ({why})", "write it anew")
        yield Raw(number + 1 if number else 0, None, [problem])
