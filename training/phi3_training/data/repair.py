"""`phi3 data fix` and `phi3 data convert`: chats of any format written as messages, one per line.

`fix` repairs what `check` refuses and lists every change; `convert` changes no conversation.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from ..errors import DataError, UsageError, folded
from . import faults
from .conversation import ROLES, UNFIT
from .faults import Fault, in_order, place, shown
from .findings import ends_reading
from .formats import (
    LIST_KEYS,
    ROLE_ALIASES,
    ROLE_KEYS,
    TEXT_KEYS,
    TOOL_KEYS,
    TOOL_ROLES,
)
from .jsonl import LINE_LIMIT, CheckedRow, check_row, encode
from .prepare import chosen_sources
from .readers import Note, Raw
from .scan import Table, scan
from .sources import Source, place_of, rows_of, source_of

_ROLE_NAMES = {**{role: role for role in ROLES}, **ROLE_ALIASES}
_BETWEEN = "\n\n"  # joined turns: paragraphs of one message


class Step(NamedTuple):
    """What was done to a row; `kind` is a stable name."""

    kind: str
    what: str


@dataclass(frozen=True)
class Change:
    """A step and where the row is; `row` is its number where several rows may share a line."""

    path: Path
    line: int
    row: int | None
    kind: str
    what: str

    @property
    def place(self) -> str:
        """`file:line`, as editors open it; with the row where several may be on the line."""
        return place(self.path, self.line, self.row or 0)

    def as_fault(self, fix: str) -> Fault:
        """The change as what is wrong with the row."""
        return Fault(self.path, self.line, self.kind, self.what, fix, row=self.row)

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"

    def as_dict(self) -> dict[str, object]:
        """For `-o json`."""
        return {
            "file": str(self.path),
            "line": self.line,
            "row": self.row,
            "kind": self.kind,
            "what": self.what,
        }


@dataclass(frozen=True)
class FixReport:
    """What `fix` read, wrote and changed."""

    out: Path
    read: int
    written: int
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: the counts, then the changes, those of one kind on one line."""
        out = len([change for change in self.changes if change.kind == "left-out"])
        changed = {(c.path, c.line, c.row) for c in self.changes if c.kind != "left-out"}
        counts = (
            f"{shown(self.out)}: {self.written} of {self.read} rows written, {len(changed)} of "
            f"them repaired, {out} left out"
        )
        if not self.changes:
            return [*self.notes, f"{counts}: nothing had to be repaired"]
        return [*self.notes, counts, *(f"  {line}" for line in folded(self.changes))]

    def every_line(self) -> str:
        """Every change, one line each, for a file."""
        return "".join(f"{change.kind}: {change}\n" for change in self.changes)

    def as_dict(self) -> dict[str, object]:
        """For `-o json`: nothing is left out."""
        return {
            "out": str(self.out),
            "read": self.read,
            "written": self.written,
            "counts": dict(Counter(change.kind for change in self.changes)),
            "changes": [change.as_dict() for change in self.changes],
            "notes": list(self.notes),
        }


def fix(paths: Sequence[Path | str], out: Path, *, force: bool = False) -> FixReport:
    """Write a copy of the chats that passes `phi3 data check`.

    Raises UsageError where `out` may not be written, and DataError where a source cannot be read
    or where no row is left; then nothing is written.
    """
    sources, notes = _opened(paths, out, force=force)
    changes: list[Change] = []
    seen: dict[bytes, str] = {}
    unused: Counter[str] = Counter()
    read = 0
    with _written(out) as stream:
        for source in sources:
            path = place_of(source)
            for raw in _rows(source, partial(_note, notes, path)):
                lost = [problem for problem in raw.problems if ends_reading(source, problem)]
                if raw.line == 0 or lost:  # more than a row would be left out
                    problems = lost or raw.problems
                    raise DataError([Fault.at(path, raw.line, p, raw.row) for p in problems])
                read += 1
                row, steps = _row(raw)
                if row is not None:
                    # Texts without roles: those follow from whether a system message is in front. A
                    # digest of them, so that memory grows by 32 bytes a row.
                    key = hashlib.sha256(b"%d" % row.has_system + row.joined).digest()
                    here = place(path, raw.line, raw.row)
                    first = seen.setdefault(key, here)
                    if first != here:
                        steps = [_left_out(f"it is the same conversation as {first}")]
                        row = None
                if row is not None:
                    unused.update(f"{shown(path)}: {key!r}" for key in row.unused)
                changes += [Change(path, raw.line, raw.row or None, *step) for step in steps]
                if row is not None and row.written is not None:
                    stream.write(row.written + b"\n")
        written = len(seen)
        if not written:
            stop = "correct the rows in their source"
            none = Fault.at(place_of(sources[0]), 0, faults.NO_ROWS())
            raise DataError([change.as_fault(stop) for change in changes] or [none])
    # What no conversation has a place for is named, once per file and key.
    notes += [f"note: {key} of {rows} row{'s' * (rows > 1)} is not used and not written"
              for key, rows in unused.items()]  # fmt: skip
    return FixReport(out, read, written, tuple(changes), tuple(notes))


def _rows(source: Source, note: Note) -> Iterator[Raw]:
    """The rows unchanged; a source that cannot be read is a problem of its line 0."""
    try:
        yield from rows_of(source, note)
    except OSError as error:
        yield Raw(0, None, [faults.UNREADABLE(why=error.strerror or error)])


def _note(notes: list[str], path: Path, text: str) -> None:
    line = f"note: {shown(path)}: {text}"
    if line not in notes:
        notes.append(line)


def _left_out(why: str) -> Step:
    return Step("left-out", f"the row was left out: {why}")


def _row(raw: Raw) -> tuple[CheckedRow | None, list[Step]]:
    """The row as it is written, and what was done to it; None where it is left out."""
    value = raw.value
    if raw.problems:  # what it says is not certain: repeated keys, broken JSON
        return None, [_left_out("; ".join(problem.what for problem in raw.problems))]
    if not isinstance(value, dict):
        return None, [_left_out("it is not an object")]
    if not any(value.values()):
        return None, [_left_out("it is empty")]
    # Without the turns of its tools an answer comes from nowhere: such a row is never repaired.
    lists = [key for key in value if key in LIST_KEYS]
    for key in lists:
        turns = value[key]
        for number, turn in enumerate(turns if isinstance(turns, list) else [], start=1):
            if not isinstance(turn, dict):
                continue
            role = turn.get("role", turn.get("from"))
            called = [name for name in TOOL_KEYS if turn.get(name)]
            is_tool = str(role).strip().lower() in TOOL_ROLES
            if is_tool or called:
                what = f"is of the role {role!r}" if is_tool else f"has {called[0]!r}"
                why = f"turn {number} {what}, and tools cannot be trained on"
                return None, [_left_out(why)]
    row = check_row(value)
    steps: list[Step] = []
    if isinstance(row, list):
        # What can be repaired is; the same reader judges the result.
        value = {key: _clean(inside, key, steps) for key, inside in value.items()}
        for key in lists:
            turns = value[key]
            if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
                value[key] = _repaired_turns([dict(turn) for turn in turns], steps)
        row = check_row(value)
    if isinstance(row, list):
        return None, [_left_out("; ".join(problem.what for problem in row))]
    if len(row.written or b"") > LINE_LIMIT:
        return None, [_left_out(f"it is longer than {LINE_LIMIT >> 20} MiB")]
    return row, steps


def _clean(value: object, place: str, steps: list[Step]) -> object:
    """A value whose texts have no character that cannot be trained on."""
    if isinstance(value, str) and (controls := UNFIT.findall(value)):
        names = ", ".join(f"U+{ord(mark):04X}" for mark in dict.fromkeys(controls))
        what = f"control characters ({names}, {len(controls)} in all) were removed from {place}"
        steps.append(Step("characters", what))
        return UNFIT.sub("", value)
    if isinstance(value, list):
        return [_clean(item, f"{place}[{i}]", steps) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _clean(item, f"{place}.{key}", steps) for key, item in value.items()}
    return value


def _repaired_turns(turns: list[dict[str, object]], steps: list[Step]) -> list[dict[str, object]]:
    """The turns in the order of Phi-3's template, as far as dropping and joining brings them."""
    role_key, text_key = (
        next((key for key in keys if any(key in turn for turn in turns)), keys[0])
        for keys in (ROLE_KEYS, TEXT_KEYS)
    )
    if any(text_key not in turn and turn.keys() & {*TEXT_KEYS} for turn in turns):
        return turns  # spelt in two ways: what looks empty may be under the other key

    def role(turn: Mapping[str, object]) -> str | None:
        return _ROLE_NAMES.get(str(turn.get(role_key)))

    repaired: list[dict[str, object]] = []
    for number, turn in enumerate(turns, start=1):
        spelt, plain = turn.get(role_key), str(turn.get(role_key)).strip().lower()
        if spelt != plain and plain in _ROLE_NAMES:
            steps.append(Step("role-name", f"the role {spelt!r} was written as {plain!r}"))
            turn[role_key] = plain
        text = turn.get(text_key)
        if text is None or text == [] or (isinstance(text, str) and not text.strip()):
            named = role(turn) or "unknown"
            steps.append(Step("empty-turn", f"turn {number} ({named}) was empty and was dropped"))
            continue
        before = repaired[-1] if repaired else None
        if before is not None and role(turn) is not None and role(before) == role(turn):
            # Unless anything else about them differs, such as a weight; human and user are one.
            others = {text_key, "from", "role"}
            rest = [{k: v for k, v in t.items() if k not in others} for t in (before, turn)]
            text_before = before[text_key]
            joined: object = None
            if isinstance(text_before, list) and isinstance(text, list):  # of parts
                joined = [*text_before, *text]
            elif isinstance(text_before, str) and isinstance(text, str):
                joined = f"{text_before}{_BETWEEN}{text}"
            if joined is not None and rest[0] == rest[1]:
                repaired[-1] = {**before, text_key: joined}
                what = f"two {role(turn)} turns in a row were joined (turn {number})"
                steps.append(Step("joined", what))
                continue
        repaired.append(turn)
    # Phi-3's template begins with the user: a greeting by the assistant has no place in it, and no
    # answer depends on it.
    start = 1 if repaired and role(repaired[0]) == "system" else 0
    if len(repaired) > start + 1 and role(repaired[start]) == "assistant":
        said = str(repaired.pop(start).get(text_key))
        quoted = repr(said if len(said) <= 40 else said[:39] + "…")
        steps.append(
            Step("greeting", f"the greeting {quoted} before the first question was dropped")
        )
    if len(repaired) > start + 1 and role(repaired[-1]) == "user":
        repaired.pop()
        steps.append(Step("open-end", "the last question, which has no answer, was cut off"))
    return repaired


# The same conversations in another form: messages, or what OpenAI's fine-tuning takes.

Form = Literal["messages", "openai"]


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` read and wrote; `dropped` counts keys that the form has no place for."""

    out: Path
    form: Form
    formats: dict[str, int]
    written: int
    dropped: dict[str, int]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        read = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        lines = [*self.notes]
        lines += [f"{shown(self.out)}: {self.written} rows written as {self.form} (read: {read})"]
        lines += [
            f"  {count} rows had {key!r}, which OpenAI's form has no place for; it was left out"
            for key, count in self.dropped.items()
        ]
        return lines

    def as_dict(self) -> dict[str, object]:
        """For `-o json`."""
        return {
            "out": str(self.out),
            "to": self.form,
            "formats": self.formats,
            "written": self.written,
            "dropped": self.dropped,
            "notes": list(self.notes),
        }


def convert(
    paths: Sequence[Path | str], out: Path, form: Form = "messages", *, force: bool = False
) -> ConvertReport:
    """Write all conversations, unchanged and in order, in one form.

    `openai` is the chat form of OpenAI's fine-tuning: an object with `messages` alone
    (https://platform.openai.com/docs/guides/supervised-fine-tuning). Raises UsageError where
    `out` may not be written, and DataError with every fault of every source.
    """
    sources, notes = _opened(paths, out, force=force)
    dropped: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="phi3-convert-") as folder, _written(out) as stream:
        scans = scan([("train", source) for source in sources], Path(folder))
        if faults := in_order(fault for scanned in scans for fault in scanned.faults):
            raise DataError(faults)
        table = Table(scans)
        formats: Counter[str] = Counter()
        for scanned in scans:
            formats += scanned.formats
            for text in scanned.notes:
                _note(notes, scanned.path, text)
        for number in range(len(table)):
            row = table.conversation(number).to_dict()
            if form == "openai":
                dropped.update(row.keys() - {"messages"})
                row = {"messages": row["messages"]}
            stream.write(encode(row) + b"\n")
    return ConvertReport(out, form, dict(formats), len(table), dict(dropped), tuple(notes))


def _opened(
    paths: Sequence[Path | str], out: Path, *, force: bool
) -> tuple[list[Source], list[str]]:
    """The sources to read, and notes on them.

    Raises UsageError for an `out` that would destroy something.
    """
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UsageError(f"{out}: JSON lines are written; name a file that ends with .jsonl")
    chosen, faults, notes = chosen_sources({"train": [source_of(path) for path in paths]})
    sources = [source for _, source in chosen]
    if any(isinstance(one, Path) and one.resolve() == out.resolve() for one in sources):
        raise UsageError(f"{out} is one of the files to read; write to another file with -o OUT")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out} cannot be written: name a file in a folder that exists")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; name another file, or replace it with --force")
    if faults:
        raise DataError(faults)
    return sources, notes


@contextmanager
def _written(out: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `out` once all is written; nothing after an error."""
    temporary = out.with_name(f".{out.name}.new")  # next to it: a rename within one file system
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
