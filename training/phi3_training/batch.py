"""Thousands of lines asked in parallel: bounded, resumable, each answer saved as it comes."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_tool.client import ChatReply
from phi3_tool.errors import (
    AuthenticationError,
    ConfigurationError,
    EndpointNotFoundError,
    Phi3Error,
    ThrottledError,
)
from phi3_tool.wire import to_messages

from .data.sources import rows_of
from .errors import StageError, UsageError, shortened
from .progress import Progress, no_progress
from .run import sha256_of, write_atomically

log = logging.getLogger(__name__)

# ---- the lines of a batch: read from a JSONL file or a table, every fault named at once

# The flow's other inputs; a null counts as not given.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "chat_history": ((list,), "a list of turns"),
    "system_prompt": ((str,), "text"),
    "temperature": ((int, float), "a number"),
    "top_p": ((int, float), "a number"),
    "max_new_tokens": ((int,), "a whole number"),
}
_TEXT = "system_prompt"
# Names that can only mean the question; compared without regard to case.
QUESTION_COLUMNS = (
    "input_data",
    "question",
    "prompt",
    "input",
    "query",
    "inputs.input_data",
    "inputs.question",
)
TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".gz")


@dataclass(frozen=True)
class Line:
    """One line of the data: its number, as `pf run` counts (from 0), and its columns."""

    number: int
    columns: Mapping[str, Any]
    turns: int = 0


def no_note(_text: str) -> None:
    """Takes a note that nobody reads."""


def read_lines(
    path: Path, renamed: Mapping[str, str], note: Callable[[str], None] = no_note
) -> list[Line]:
    """The rows of a JSONL file or of any table the training reads; all faults at once.

    `renamed` columns get the flow's names. Where neither it nor the first row names input_data,
    one column of QUESTION_COLUMNS is taken for it and `note` says which.
    """
    faults: list[str] = []
    lines: list[Line] = []
    table = path.suffix.lower() in TABLES
    try:
        for place, row in _rows_of(path, table=table):
            unnamed = "input_data" not in row and "input_data" not in renamed
            if isinstance(row, dict) and unnamed and not lines and not faults:
                # Guessed from the first row alone: a file whose rows differ gets a fault per row.
                fitting = [name for name in row if name.strip().casefold() in QUESTION_COLUMNS]
                if len(fitting) > 1:
                    raise UsageError(
                        f"The columns {', '.join(fitting)} could all be the question; choose one "
                        "with --map input_data=COLUMN"
                    )
                if fitting:
                    note(f"Questions from the column {fitting[0]}")
                    renamed = {**renamed, "input_data": fitting[0]}
            columns = _columns(row, renamed, cells=table) if isinstance(row, dict) else row
            if isinstance(columns, str):
                faults.append(f"{path}:{place}: {columns}")
            else:
                lines.append(Line(len(lines), columns))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if faults:
        shown = "\n  ".join(shortened(faults))
        raise UsageError(f"{path} has faults, so nothing was sent:\n  {shown}")
    if not lines:
        raise UsageError(f"{path} has no lines")
    return lines


def _rows_of(path: Path, *, table: bool) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and object of each row, or what is wrong with it."""
    if table:  # as the reader of the training data gives them
        for raw in rows_of(path):
            if raw.problems:
                yield raw.line, "; ".join(f"{p.what} ({p.fix})" for p in raw.problems)
            else:
                yield raw.line, raw.value if isinstance(raw.value, dict) else "not a JSON object"
        return
    # utf-8-sig: Windows' editors begin a file with a byte order mark. Split at line feeds alone,
    # because str.splitlines also splits at signs that JSON allows inside a string (U+2028).
    for place, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError:
            yield place, "not JSON"
        else:
            yield place, row if isinstance(row, dict) else "not a JSON object"


def _columns(
    row: Mapping[str, Any], renamed: Mapping[str, str], *, cells: bool
) -> dict[str, Any] | str:
    """The columns of a row, or what is wrong with it; `cells`: numbers and lists may be text."""
    absent = [theirs for theirs in renamed.values() if theirs not in row]
    if absent:
        return f"no column {', '.join(absent)}; it has {', '.join(row)}"
    columns = {**row, **{ours: row[theirs] for ours, theirs in renamed.items()}}
    question = columns.get("input_data")
    if not isinstance(question, str) or not question.strip():
        return (
            "no text in the column input_data (name another with --map input_data=COLUMN); "
            f"it has {', '.join(row)}"
        )
    for name in _TYPES if cells else ():
        cell = columns.get(name)
        if isinstance(cell, str) and name != _TEXT:
            # An empty cell gives nothing, as a null does in JSON.
            with contextlib.suppress(ValueError):
                columns[name] = json.loads(cell) if cell.strip() else None
    wrong = [
        f"{name} must be {what}, not {columns[name]!r:.40}"
        for name, (kinds, what) in _TYPES.items()
        if columns.get(name) is not None
        and (not isinstance(columns[name], kinds) or isinstance(columns[name], bool))
    ]
    return "; ".join(wrong) or columns


# ---- the answers: a JSONL file that loses nothing when its writer is killed
# Appends to OUT as answers come and sorts it at the end; OUT.batch.json next to it records what
# was asked, without a key.

Row = dict[str, Any]


class Answers:
    """OUT: what an earlier batch left in it, and what is appended to it now."""

    def __init__(self, path: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._record = path.with_name(path.name + ".batch.json")
        self._rows: dict[int, Row] = {}
        if path.exists() and not resume:
            raise UsageError(
                f"{path} already exists; complete it with --resume, or choose another file with "
                f"--out FILE"
            )
        if path.exists():
            try:
                before = json.loads(self._record.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise UsageError(
                    f"{path} has no {self._record.name} next to it, so it was not written by "
                    "`phi3 batch`; choose another file with --out FILE"
                ) from None
            changed = [name for name in asked if before.get(name) != asked[name]]
            if changed:
                raise UsageError(
                    f"{path} was started with different {', '.join(changed)}, so its answers "
                    "cannot be mixed with new ones; choose another file with --out FILE"
                )
            for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(text)
                except ValueError:  # a truncated last line
                    continue
                is_row = isinstance(row, dict) and isinstance(row.get("line_number"), int)
                # A line that failed is asked again: that is what --resume is for.
                if is_row and not row.get("error"):
                    self._rows[row["line_number"]] = row
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._record, json.dumps(asked, indent=2, ensure_ascii=False) + "\n")
        # Every line is complete, except a truncated last one that a killed process may leave.
        self._write_in_order()
        self._stream = path.open("a", encoding="utf-8")

    def has(self, line: Line) -> bool:
        """Whether the line was answered before."""
        return line.number in self._rows

    def add(self, row: Row) -> None:
        """Append a row; it is with the system when this returns, whatever becomes of us."""
        self._stream.write(_text_of(row))
        self._stream.flush()
        self._rows[row["line_number"]] = row

    def close(self) -> None:
        """Put all rows in the order of the data."""
        self._stream.close()
        self._write_in_order()

    def _write_in_order(self) -> None:
        write_atomically(self.path, "".join(_text_of(self._rows[n]) for n in sorted(self._rows)))


def _text_of(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def asked_of(
    data: Path,
    renamed: Mapping[str, str],
    defaults: Mapping[str, Any],
    endpoint: str,
    details: bool,
) -> dict[str, Any]:
    """What --resume compares, so that answers to other questions are never mixed; no secret."""
    return {
        "data": sha256_of(data),
        "columns": dict(renamed),
        "parameters": dict(defaults),
        "endpoint": endpoint,
        "details": details,
    }


# ---- asking: many lines at once, in threads over one pooled client

PARAMETERS = ("temperature", "top_p", "max_new_tokens")
INPUTS = ("input_data", "chat_history", "system_prompt", *PARAMETERS)
# A line goes to the end of the queue this often before its 429 counts as its outcome; the client
# has used up its own retries each time.
_THROTTLED_TURNS = 5

Ask = Callable[[Line], ChatReply]


@dataclass(frozen=True)
class Outcome:
    """What became of a line: a reply or an error."""

    line: Line
    reply: ChatReply | None = None
    error: Phi3Error | None = None

    def row(self, details: bool) -> dict[str, Any]:
        """The row of OUT: the columns of `pf run`, and `error` where there is no answer."""
        row: dict[str, Any] = {
            "line_number": self.line.number,
            "answer": self.reply and self.reply.text,
        }
        error = f"{type(self.error).__name__}: {self.error}" if self.error else ""
        if details:
            seconds = self.reply.seconds if self.reply else None
            return {**self.line.columns, **row, "error": error, "seconds": seconds}
        return {**row, "error": error} if error else row


def asker(chat: Callable[..., ChatReply], defaults: Mapping[str, Any], context_length: int) -> Ask:
    """Asks a line as the chat flow does: same messages, same parameters, same trimming."""

    def ask(line: Line) -> ChatReply:
        given = {**defaults, **{k: v for k, v in line.columns.items() if v is not None}}
        parameters = {name: given[name] for name in PARAMETERS}
        room = context_length - int(parameters["max_new_tokens"])
        messages = to_messages(
            given.get("chat_history"),
            given["input_data"],
            given.get("system_prompt"),
            max_tokens=room,
        )
        return chat(messages, **parameters)

    return ask


class Pace:
    """How many lines may be in flight: halved when the endpoint throttles, raised as it answers."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._busy = 0
        self._age = 0
        self._changed = threading.Condition()

    def __enter__(self) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._busy < int(self._limit))
            self._busy += 1
            return self._age

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._busy -= 1
            self._changed.notify()

    def throttled(self, age: int) -> None:
        """Half as many in flight from here on, unless that was done since this line was begun."""
        with self._changed:
            # Lines in flight are throttled together: one burst of 429s must halve once, not once
            # for each of its lines.
            if age != self._age:
                return
            self._age += 1
            self._limit = max(1.0, self._limit / 2)
            log.info("the endpoint is throttling: now %d lines at a time", int(self._limit))

    def answered(self) -> None:
        """A little more, until the most is reached again."""
        with self._changed:
            # As TCP's congestion avoidance: one line more for each round of answers, since a round
            # has `limit` of them; halving above is the other half of that rule.
            self._limit = min(float(self._most), self._limit + 1 / self._limit)
            self._changed.notify()


def ask_all(ask: Ask, lines: Sequence[Line], concurrency: int) -> Generator[Outcome, None, None]:
    """Outcomes in the order in which they come. Closing the iterator asks no further line."""
    waiting: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
    for line in lines:
        waiting.put(line)
    stop, pace = threading.Event(), Pace(concurrency)
    threads = min(concurrency, len(lines))

    def work() -> None:
        try:
            while (line := waiting.get()) is not None and not stop.is_set():
                with pace as age:
                    try:
                        outcome = Outcome(line, reply=ask(line))
                    except Phi3Error as error:
                        outcome = Outcome(line, error=error)
                if outcome.reply is not None:
                    pace.answered()
                elif isinstance(outcome.error, ThrottledError):
                    pace.throttled(age)
                # Asked again after the others, when the endpoint may have room.
                if isinstance(outcome.error, ThrottledError) and line.turns < _THROTTLED_TURNS:
                    waiting.put(Line(line.number, line.columns, line.turns + 1))
                else:
                    done.put(outcome)
        finally:
            done.put(None)

    for _ in range(threads):
        # Daemons: an interrupted batch does not wait for answers that would be lost.
        threading.Thread(target=work, name="phi3-batch", daemon=True).start()
    try:
        for _ in lines:
            finished = done.get()
            if finished is None:  # nobody asked it to end: it broke, and its line is lost
                raise RuntimeError("a batch thread crashed; its traceback is above")
            yield finished
    finally:
        stop.set()
        for _ in range(threads):
            waiting.put(None)


# ---- one batch: every line without an answer is sent; each outcome is written as it comes

# After these no other line would fare better: the rest is not asked.
HOPELESS = (AuthenticationError, EndpointNotFoundError, ConfigurationError)
# As many failures without one answer between them: the endpoint is down, not the lines faulty.
FAILED_IN_A_ROW = 50


@dataclass
class Tally:
    """How a batch ended."""

    lines: int
    answered_before: int = 0  # by an earlier run of the same batch
    answered: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    stopped_by: str = ""

    @property
    def failed(self) -> int:
        """Lines that have an error instead of an answer."""
        return sum(self.failures.values())

    @property
    def missing(self) -> int:
        """Lines that were not asked, because the batch was stopped."""
        return self.lines - self.answered_before - self.answered - self.failed


def run_batch(
    ask: Ask,
    lines: Sequence[Line],
    answers: Answers,
    *,
    concurrency: int,
    details: bool = False,
    step: Progress = no_progress,
) -> Tally:
    """Ask every line that has no answer yet; each outcome is written as it comes."""
    left = [line for line in lines if not answers.has(line)]
    tally = Tally(len(lines), answered_before=len(lines) - len(left))
    in_a_row, started = 0, time.monotonic()
    outcomes = ask_all(ask, left, concurrency)
    try:
        for outcome in outcomes:
            answers.add(outcome.row(details))
            if outcome.error is None:
                tally.answered, in_a_row = tally.answered + 1, 0
            else:
                kind = type(outcome.error).__name__
                tally.failures[kind] = tally.failures.get(kind, 0) + 1
                in_a_row += 1
                if isinstance(outcome.error, HOPELESS) or in_a_row >= FAILED_IN_A_ROW:
                    tally.stopped_by = f"{kind}: {outcome.error}"
                    break
            rate = (tally.answered + tally.failed) / max(1e-9, time.monotonic() - started)
            done = tally.answered_before + tally.answered + tally.failed
            step(done, tally.lines, f"{done}/{tally.lines}, {rate:.0f}/s, {tally.failed} failed")
    finally:
        outcomes.close()
        answers.close()
    return tally


def verdict(tally: Tally, again: str) -> None:
    """StageError where a line has no answer: how many, why, and what does them again."""
    if not tally.failed and not tally.missing:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.failures.items()))
    text = f"{tally.failed} of {tally.lines} lines failed ({kinds})"
    if tally.stopped_by:
        text += f" and {tally.missing} were not sent, because they would fail the same way:\n"
        text += f"  {tally.stopped_by}\n"
    else:
        text += "; each has its error in the file.\n"
    raise StageError(f"{text}Retry only these lines with: {again}")
