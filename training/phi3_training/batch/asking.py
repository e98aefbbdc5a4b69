"""Asks many lines at once, in threads over one pooled client; slower where the endpoint throttles.

No input or output of its own but the questions themselves.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_tool import ChatReply, Phi3Error, ThrottledError, to_messages

from .lines import Line

log = logging.getLogger(__name__)

PARAMETERS = ("temperature", "top_p", "max_new_tokens")
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
        """Half as many at once from here on, unless that was done since this line was begun."""
        with self._changed:
            if age != self._age:
                return
            self._age += 1
            self._limit = max(1.0, self._limit / 2)
            log.info("the endpoint throttles: %d lines at once", int(self._limit))

    def answered(self) -> None:
        """A little more, until the most is reached again."""
        with self._changed:
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
                outcome = _paced(ask, line, pace)
                if isinstance(outcome.error, ThrottledError) and line.turns < _THROTTLED_TURNS:
                    waiting.put(Line(line.number, line.columns, line.turns + 1))
                else:
                    done.put(outcome)
        finally:
            done.put(None)

    for _ in range(threads):
        # Daemons: an interrupted batch does not wait for answers nobody will keep.
        threading.Thread(target=work, name="phi3-batch", daemon=True).start()
    try:
        for _ in lines:
            finished = done.get()
            if finished is None:  # nobody asked it to end: it broke, and its line is lost
                raise RuntimeError("a thread of the batch broke; its traceback is above")
            yield finished
    finally:
        stop.set()
        for _ in range(threads):
            waiting.put(None)


def _paced(ask: Ask, line: Line, pace: Pace) -> Outcome:
    with pace as age:
        outcome = _outcome(ask, line)
    if outcome.reply is not None:
        pace.answered()
    elif isinstance(outcome.error, ThrottledError):
        pace.throttled(age)
    return outcome


def _outcome(ask: Ask, line: Line) -> Outcome:
    try:
        return Outcome(line, reply=ask(line))
    except Phi3Error as error:
        return Outcome(line, error=error)
