"""Rows of files of every kind, one by one: memory holds one row, not the file.

Text is opened as UTF-8 without a mark, however it is encoded, and packed with gzip or not. Read are
JSON that is no JSON lines (an array, an object around one, pretty-printed rows), CSV, parquet and
Arrow.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from ..errors import MissingExtraError
from . import faults
from .faults import Problem
from .formats import JSON_CELLS, read_row
from .jsonl import LINE_LIMIT, StrictJson


class Raw(NamedTuple):
    """A row as a reader gives it, with what was wrong on the way.

    `row` numbers the rows of a file in which several may share a line; else it is 0.
    """

    line: int
    value: Any
    problems: list[Problem]
    row: int = 0


# How the bytes of a file become text. A gzip file that unpacks to far more than chats do is
# refused while it is read.

Note = Callable[[str], None]  # takes what a person should know of a file, each thing once

_PIECE = 1 << 18  # bytes held at once
_HEAD = 1 << 12
_GZIP = b"\x1f\x8b"  # RFC 1952, 2.3.1
# UTF-32's mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FOREIGN = (
    (b"PK\x03\x04", "a zip file or an Excel workbook", "unpack it, or save the sheet as CSV UTF-8"),
    (b"BZh", "packed with bzip2", "unpack it, e.g. with: bunzip2 FILE"),
    (b"\xfd7zXZ\0", "packed with xz", "unpack it, e.g. with: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "unpack it, e.g. with: unzstd FILE"),
    (b"PAR1", "a parquet file", "name it .parquet"),
    (b"ARROW1\0\0", "an Arrow file", "name it .arrow"),
)
# Gzip makes text of chats 3 to 30 times smaller, and nothing more than 1032 times.
MOST_UNPACKED = 64 << 20  # bytes that any gzip file may unpack to
MOST_TIMES = 100  # and how many times its own size a larger one may
# Windows-1252: what it leaves undefined, and how much of the letters of a Western language is
# not ASCII (5 in 100 of French); Cyrillic in Windows-1251 is nearly nothing else.
_UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
_LETTERS = re.compile(rb"[A-Za-z\x80-\xff]")
_UTF8_PAIR = re.compile(rb"[\xc3-\xf4][\x80-\xbf]")
_WORD = re.compile(rb"[A-Za-z\x80-\xff]{0,20}[\x80-\xff][A-Za-z\x80-\xff]{0,20}")
_MOST_FOREIGN = 0.25


class BrokenFileError(ValueError):
    """A file whose bytes cannot be read to their end; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


class Encoding(NamedTuple):
    """How the bytes of a file become text, judged by its first bytes."""

    packed: bool = False
    codec: str = "utf-8"
    mark: bytes = b""

    @property
    def is_plain(self) -> bool:
        """Whether the file itself is UTF-8, so that it can be read from any place."""
        return not self.packed and self.codec == "utf-8"

    def report(self, note: Note) -> None:
        """Note what is unusual."""
        if self.packed:
            note("unpacked with gzip")
        if self.mark and self.codec == "utf-8":
            note("a byte-order mark (BOM) at its start was skipped")
        elif self.mark:
            note(f"read as {self.codec.upper()}, as its byte-order mark says")
        elif self.codec != "utf-8":
            note(f"read as {self.codec.upper()}, because every other byte is zero")


PLAIN = Encoding()


def encoding_of(path: Path) -> Encoding:
    """The encoding of a file. Raises OSError, and BrokenFileError for what is no text."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    packed = head.startswith(_GZIP)
    if packed:
        with _Unpacked(path) as unpacked:
            head = unpacked.read(_HEAD)
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            inside = "after unpacking with gzip it is" if packed else "it is"
            raise BrokenFileError(faults.NOT_TEXT_FILE(start=inside, what=what, fix=fix))
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return Encoding(packed, codec, mark)
    # What Windows programs write for "Unicode" at times: most letters of Western languages have a
    # zero byte, always on the same side.
    even, odd = head[::2], head[1::2]
    for codec, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if len(head) >= 8 and 0 not in others and zeros.count(0) > len(zeros) / 2:
            return Encoding(packed, codec)
    return Encoding(packed)


def open_text(path: Path, encoding: Encoding) -> BinaryIO:
    """The file as a stream of UTF-8 without a mark.

    Its reads raise BrokenFileError where the file cannot be unpacked or decoded.
    """
    stream: BinaryIO = io.BufferedReader(_Unpacked(path)) if encoding.packed else path.open("rb")
    if encoding.codec == "utf-8":
        stream.read(len(encoding.mark))
        return stream
    return io.BufferedReader(_Recoded(stream, encoding.codec), _PIECE)


class _Unpacked(io.RawIOBase):
    """What is in a gzip file, up to a limit."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._stream = gzip.open(path)  # noqa: SIM115 - closed with this
        self._most = max(MOST_UNPACKED, MOST_TIMES * path.stat().st_size)
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            piece = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenFileError(faults.BROKEN_GZIP(why=error)) from None
        buffer[: len(piece)] = piece
        self._given += len(piece)
        if self._given > self._most:
            most = self._most >> 20
            raise BrokenFileError(faults.GZIP_TOO_LARGE(most=most, times=MOST_TIMES))
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Recoded(io.RawIOBase):
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO, codec: str) -> None:
        super().__init__()
        self._stream, self._codec = stream, codec
        self._decoder = codecs.getincrementaldecoder(codec)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            piece = self._stream.read(_PIECE)
            try:
                self._ready = self._decoder.decode(piece, not piece).encode()
            except UnicodeError:
                problem = faults.WRONG_ENCODING(name=self._codec.upper())
                raise BrokenFileError(problem) from None
            if not piece:
                break
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


def table_encoding(path: Path, note: Note) -> Encoding:
    """The encoding of a CSV file: what Excel writes has no mark where it is not UTF-8.

    Such a file is read as Windows-1252, which is said with a word of it, so that a person sees
    whether it was. Raises BrokenFileError where it cannot be that either.
    """
    encoding = encoding_of(path)
    if encoding.codec != "utf-8":
        return encoding
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_utf8, foreign, letters, example = True, 0, 0, ""
    pairs = undefined = 0
    with open_text(path, encoding) as stream:
        while piece := stream.read(_PIECE):
            if is_utf8:
                try:
                    decoder.decode(piece)
                except UnicodeDecodeError:
                    is_utf8 = False
            if not piece.isascii():
                foreign += len(_NOT_ASCII.findall(piece))
                letters += len(_LETTERS.findall(piece))
                pairs += len(_UTF8_PAIR.findall(piece))
                undefined += len(_UNDEFINED.findall(piece))
                word = _WORD.search(piece)
                example = example or (word.group().decode("cp1252", "replace") if word else "")
    if is_utf8 and not decoder.getstate()[0]:
        return encoding
    # Letters of UTF-8 in between: a damaged UTF-8 file, which would be read as other letters.
    if undefined or pairs * 2 > foreign or foreign > _MOST_FOREIGN * letters:
        raise BrokenFileError(faults.NOT_UTF8_NOR_1252())
    note(f"read as Windows-1252, because it is not UTF-8 (one of its words: {example!r})")
    return encoding._replace(codec="cp1252")


# JSON text that is no JSON lines.

_CHUNK = 1 << 16  # characters that the window over a document grows by
_SPACES = " \t\r\n"  # JSON's own (RFC 8259, section 2); str.strip() takes others as well


def is_document(path: Path, encoding: Encoding) -> bool:
    """Whether a file is JSON over several lines rather than JSON lines, judged by its first MiB.

    Raises OSError, and BrokenFileError for what cannot be unpacked.
    """
    with open_text(path, encoding) as stream:
        head = stream.read(LINE_LIMIT + 1).decode("utf-8", "ignore")
    text = head.lstrip()
    if not text.startswith(("{", "[")):
        return False
    is_json = ".json" in [suffix.lower() for suffix in path.suffixes[-2:]]
    line, _, rest = text.partition("\n")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if value is not None:
        if rest.strip():  # a row to a line, whatever they are
            return isinstance(value, list) and is_json
        if isinstance(value, list):
            return True
        # An object alone is a row, or a wrapper around the one list of rows in it.
        return read_row(value)[0] is None and sum(map(_are_rows, value.values())) == 1
    # The first line is no JSON: one value over many lines, or JSON lines with a broken row.
    line = line.rstrip()
    if line.startswith("["):
        return is_json or line[1:].lstrip()[:1] in ("", "{", "]")
    if len(line) > LINE_LIMIT:  # no row is that long
        return True
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        # Cut off by the size that is looked at; or broken, but written over lines: then the second
        # line is no row of its own.
        if len(text) > LINE_LIMIT // 2 and error.pos > len(text) - _CHUNK:
            return True
        try:
            row_follows = isinstance(json.loads(rest.partition("\n")[0]), dict)
        except (ValueError, RecursionError):
            row_follows = False
        return line.endswith(("{", "[", ",")) and not row_follows
    except (ValueError, RecursionError):
        return False
    return True


def _are_rows(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not _is_message(value[0])
    )


def _is_message(value: dict[str, object]) -> bool:
    return "role" in value or "from" in value


def document_rows(path: Path, encoding: Encoding, note: Note) -> Iterator[Raw]:
    """The rows of a file, each with the line that it starts on and its number."""
    with io.TextIOWrapper(open_text(path, encoding), encoding="utf-8", newline="\n") as stream:
        try:
            yield from _Document(stream, note).read()
        except UnicodeDecodeError:
            yield Raw(0, None, [faults.NOT_UTF8()])


class _Document:
    """Walks over JSON text with a window of limited size."""

    def __init__(self, stream: TextIO, note: Note) -> None:
        self._stream, self._note = stream, note
        self._text = ""
        self._place = 0
        self._line = 1
        self._row = 0
        self._json = StrictJson()

    def read(self) -> Iterator[Raw]:
        """All rows; what breaks the text ends the reading."""
        if self._peek() == "[":
            self._note("read as one JSON array")
            if (yield from self._array()) and self._peek():
                yield self._broken(faults.TEXT_AFTER_ARRAY())
        elif key := self._wrapping_key():
            self._note(f"its rows are the list under the key {key!r}")
            if not (yield from self._array()):
                return
            # After the list come short things, of which another list of rows is a fault.
            while len(self._text) - self._place <= LINE_LIMIT and self._more():
                pass
            rest = self._text[self._place :]
            try:
                value = json.loads("{" + rest.lstrip().removeprefix(","))
            except (ValueError, RecursionError):
                yield self._broken(faults.BROKEN_WRAPPER())
                return
            if more := [key for key, inside in value.items() if _are_rows(inside)]:
                yield self._broken(faults.SECOND_LIST(key=more[0]))
        else:
            self._note("read as JSON rows over several lines")
            while self._peek() and (yield from self._one()):
                if self._peek() == ",":
                    self._place += 1

    def _array(self) -> Generator[Raw, None, bool]:
        """The elements of an array; whether it was read to its end."""
        self._place += 1  # the bracket
        if self._peek() == "]":
            self._place += 1
            return True
        while (yield from self._one()):
            mark = self._peek()
            self._place += 1
            if mark == "]":
                return True
            if mark != ",":
                where = f"near {mark!r}" if mark else "at the end of the file"
                yield self._broken(faults.BROKEN_ARRAY(where=where))
                return False
        return False

    def _one(self) -> Generator[Raw, None, bool]:
        self._peek()
        line, self._row = self._line, self._row + 1
        while True:
            value, problems, end = self._json.read_at(self._text, self._place)
            whole = end is not None and end < len(self._text)
            if whole or len(self._text) - self._place > LINE_LIMIT or not self._more():
                break
        if end is None:
            problems = [problems[0]._replace(column=None)]
            if len(self._text) - self._place > LINE_LIMIT:
                problems = [faults.ROW_TOO_LONG(limit=LINE_LIMIT >> 20)]
        yield Raw(line, value, problems, self._row)
        if end is None:
            return False
        self._go_to(end)
        return True

    def _broken(self, problem: Problem) -> Raw:
        return Raw(self._line, None, [problem], self._row)

    def _wrapping_key(self) -> str | None:
        """The key of the list of rows in the object that starts here; then its [ is next.

        None, and nothing is read, where the object is no wrapper.
        """
        while len(self._text) <= LINE_LIMIT and self._more():
            pass
        decoder, text = json.JSONDecoder(), self._text
        try:
            whole, _ = decoder.raw_decode(text, self._place)
            if read_row(whole)[0] is not None:
                return None
        except (ValueError, RecursionError):
            pass  # larger than the window, or broken further on
        try:
            place = _next(text, self._place + 1)
            while text[place] == '"':
                key, place = decoder.raw_decode(text, place)
                place = _next(text, _next(text, place) + 1)
                inside = _next(text, place + 1)
                if text[place] == "[" and text[inside] == "{":
                    try:  # a message is no row; an object that is cut off is one
                        is_row = not _is_message(decoder.raw_decode(text, inside)[0])
                    except (ValueError, RecursionError):
                        is_row = True
                    if is_row:
                        self._go_to(place)
                        return str(key)
                _, place = decoder.raw_decode(text, place)
                place = _next(text, _next(text, place) + 1)
        except (ValueError, IndexError, RecursionError):
            pass
        return None

    def _peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            self._go_to(_next(self._text, self._place))
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _more(self) -> bool:
        chunk = self._stream.read(max(_CHUNK, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + chunk, 0
        return bool(chunk)


def _next(text: str, place: int) -> int:
    """The place of the next character that is not a space."""
    while place < len(text) and text[place] in _SPACES:
        place += 1
    return place


# Tables: a column for each key; `messages` may be JSON in its cell.

_BATCH = 256  # rows as Python objects at once: a column of long chats has 6 KB in each
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_rows(path: Path, note: Note) -> Iterator[Raw]:
    """The rows of a CSV or TSV file, whose first line names the columns."""
    csv.field_size_limit(LINE_LIMIT)  # Python's default of 131,072 is less than some chats have
    encoding = table_encoding(path, note)
    encoding.report(note)
    with io.TextIOWrapper(open_text(path, encoding), encoding="utf-8", newline="") as stream:
        lines = _Lines(stream)
        usual = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ","
        delimiter = usual
        try:
            while (first := lines.peek()) and not first.strip():  # some exports begin with these
                lines.skip()
        except UnicodeDecodeError:
            pass  # said below, with the rows before it
        else:
            # What Excel's own line `sep=;` says, else what makes most columns of the header.
            if first[:4].lower() == "sep=" and first[4:5] in _DELIMITERS:
                delimiter = first[4]
                lines.skip()
            else:
                columns = {
                    mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in _DELIMITERS
                }
                if max(columns.values()) > columns[usual]:
                    delimiter = max(columns, key=lambda mark: columns[mark])
        if delimiter != usual:
            note(f"its columns are separated by {_DELIMITERS[delimiter]}")
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from _named(reader, lines)
        except UnicodeDecodeError:
            yield Raw(0, None, [faults.NOT_UTF8()])
        except csv.Error as error:
            problem = faults.BROKEN_CSV(why=error, mark=_DELIMITERS[delimiter])
            yield Raw(reader.line_num + lines.skipped, None, [problem])


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


def _named(reader: Any, lines: _Lines) -> Iterator[Raw]:
    """The rows with the header's names as their keys; an empty cell is a key that is not there."""
    names = next(reader, None)
    if names is None:
        return
    if repeated := [name for name in names if names.count(name) > 1]:
        yield Raw(1 + lines.skipped, None, [faults.REPEATED_COLUMN(name=repeated[0])])
        return
    strict = StrictJson()
    line = reader.line_num + 1 + lines.skipped
    for values in reader:
        start, line = line, reader.line_num + 1 + lines.skipped
        lines.size = 0
        if not any(values):
            continue
        if len(values) != len(names):
            problem = faults.WRONG_COLUMNS(has=len(values), wanted=len(names))
            yield Raw(start, None, [problem])
            continue
        cells = zip(names, values, strict=True)
        row: dict[str, Any] = {key: value for key, value in cells if value}
        problems: list[Problem] = []
        for key in JSON_CELLS & row.keys():
            if not row[key].lstrip().startswith("["):
                continue
            row[key], wrong = strict.read(row[key])
            # Columns count in the cell, not in the line that an editor opens.
            problems += [problem._replace(column=None) for problem in wrong]
            if row[key] is None:
                break
        is_broken = any(value is None for value in row.values())
        yield Raw(start, None if is_broken else row, problems)


def column_rows(path: Path) -> Iterator[Raw]:
    """The rows of a parquet file, or an Arrow file of `datasets.save_to_disk`, counted from 1."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "local") from None
    kind = path.suffix.lower().removeprefix(".")

    def batches() -> Iterator[Any]:
        if kind == "parquet":
            with parquet.ParquetFile(path) as table:
                yield from table.iter_batches(batch_size=_BATCH)
            return
        with pa.memory_map(str(path)) as stream:
            # What `datasets.save_to_disk` writes is a stream.
            try:
                whole = iter(pa.ipc.open_stream(stream))
            except pa.ArrowInvalid:  # the form with an index, as Feather has it
                reader = pa.ipc.open_file(stream)
                whole = (reader.get_batch(n) for n in range(reader.num_record_batches))
            for batch in whole:
                for start in range(0, batch.num_rows, _BATCH):
                    yield batch.slice(start, _BATCH)

    number = 0
    try:
        for batch in batches():
            for row in batch.to_pylist():
                number += 1
                yield Raw(number, without_nulls(row), [], number)
    except (pa.ArrowException, OSError) as error:
        problem = faults.BROKEN_COLUMNS[kind](why=" ".join(str(error).split())[:120])
        place = number + 1 if number else 0
        yield Raw(place, None, [problem], place)


def without_nulls(value: object) -> object:
    """A row without what is null: columns, and keys of structs, that other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
