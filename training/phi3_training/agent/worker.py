"""A process that answers rows: Prompt flow's or the agent's, each with the Python that has it.

One JSON object per line to its standard input, one per row from its standard output. For
`phi3 batch --agent` it stays, and answers many lines at once.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from phi3_tool.client import ChatReply
from phi3_tool.connection import ConnectionSettings
from phi3_tool.errors import Phi3Error

from ..batch import INPUTS, Ask, Line
from ..errors import StageError
from ..flow.page import environment_of
from .environment import agent_python, command, environment

#: Starting a framework takes seconds; a row on this machine takes milliseconds.
SECONDS = 600.0
_SHOWN_LINES = 12


@dataclass(frozen=True)
class Outcome:
    """What became of a row: an answer, or an error's facts and what the framework made of it."""

    answer: object = None
    error: Mapping[str, Any] | None = None
    exception: str = ""
    seconds: float = 0.0

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Outcome:
        """From a line that a worker wrote."""
        return cls(
            line.get("answer"),
            line.get("error"),
            str(line.get("exception") or ""),
            float(line.get("seconds") or 0.0),
        )

    def failure(self) -> Phi3Error | None:
        """The error as one of phi3_tool's."""
        return None if self.error is None else Phi3Error.from_facts(self.error)


@dataclass(frozen=True)
class Program:
    """What is started, and in which environment; `name` is what an error calls it."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]


def ask_rows(
    program: Program, rows: Iterable[Mapping[str, Any]], seconds: float = SECONDS
) -> dict[str, Outcome]:
    """Every outcome by the row's id; raises StageError where the program does not end well."""
    sent = "".join(json.dumps(row) + "\n" for row in rows)
    # A file, not a pipe: nobody reads it meanwhile, and a full pipe would stop the program.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603 - our own programs
            program.command,
            env=dict(program.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
        )
        try:
            out, _ = process.communicate(sent, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise StageError(f"{program.name} did not end within {seconds:g} s") from None
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            last = [line.rstrip() for line in log if line.strip()][-_SHOWN_LINES:]
            shown = "\n  ".join(last) or "it printed nothing"
            raise StageError(f"{program.name} ended with status {process.returncode}:\n  {shown}")
    # By id, not by order: the agent answers many rows at once.
    lines = (json.loads(line) for line in out.splitlines())
    return {str(line["id"]): Outcome.read(line) for line in lines}


Asked = tuple[Program, Sequence[Mapping[str, Any]]]


def ask_both(one: Asked, other: Asked) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """The same for two programs at once; the first failure is raised."""
    # At once, because starting either framework takes seconds.
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(ask_rows, *one), pool.submit(ask_rows, *other)
        return first.result(), second.result()


class RowProcess:
    """A program that stays and answers rows from many threads at once; use it in a `with`."""

    def __init__(self, program: Program) -> None:
        self._name = program.name
        self._process = subprocess.Popen(  # noqa: S603 - our own programs
            program.command,
            env=dict(program.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[str, Future[Outcome]] = {}
        self._ended = False
        # One reader for all threads: answers come in any order, each to the future of its id.
        threading.Thread(target=self._read, name="phi3-rows", daemon=True).start()

    def ask(self, row: Mapping[str, Any]) -> Outcome:
        """The row's outcome; raises StageError when the program has ended."""
        with self._lock:
            if self._ended:
                raise self._gone()
            number = str(next(self._numbers))
            future = self._waiting[number] = Future()
            pipe = self._process.stdin
            if pipe is None:  # asked for above
                raise self._gone()
            try:
                pipe.write(json.dumps({**row, "id": number}) + "\n")
                pipe.flush()
            except OSError:
                raise self._gone() from None
        return future.result()

    def _read(self) -> None:
        for text in self._process.stdout or ():
            line = json.loads(text)
            with self._lock:
                future = self._waiting.pop(str(line["id"]))
            future.set_result(Outcome.read(line))
        with self._lock:
            self._ended = True
            lost = list(self._waiting.values())
        for future in lost:
            future.set_exception(self._gone())

    def _gone(self) -> StageError:
        return StageError(f"{self._name} has ended; its messages are above")

    def __enter__(self) -> RowProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Rows that nobody waits for any more are not waited for either.
        self._process.kill()
        self._process.wait()


@contextmanager
def agent_asker(settings: ConnectionSettings, defaults: Mapping[str, Any]) -> Iterator[Ask]:
    """What asks a line as `batch.asker` does; the workflow builds the same messages itself.

    Raises StageError where there is no environment with Agent Framework.
    """
    variables = environment(environment_of(settings))
    # One process for all lines: starting the framework takes far longer than a line.
    program = Program("The agent", command(agent_python(), ["rows"]), variables)
    with RowProcess(program) as process:

        def ask(line: Line) -> ChatReply:
            # A column of the row wins over the option; an empty cell of a table is a null here.
            given = {**defaults, **{k: v for k, v in line.columns.items() if v is not None}}
            inputs = {name: given[name] for name in INPUTS if name in given}
            outcome = process.ask({"inputs": inputs})
            failure = outcome.failure()
            if failure is not None:
                raise failure
            return ChatReply(str(outcome.answer), seconds=outcome.seconds)

        yield ask
