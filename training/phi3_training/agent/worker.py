"""A process that answers rows: Prompt flow's or the agent's, each with the Python that has it.

One JSON object per line to its standard input, one per row from its standard output.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_tool.errors import Phi3Error

from ..errors import StageError

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
    def read(cls, said: Mapping[str, Any]) -> Outcome:
        """Out of a worker's line."""
        return cls(
            said.get("answer"),
            said.get("error"),
            str(said.get("exception") or ""),
            float(said.get("seconds") or 0.0),
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
    found = (json.loads(line) for line in out.splitlines())
    return {str(said["id"]): Outcome.read(said) for said in found}


def ask_both(
    programs: Sequence[tuple[Program, Sequence[Mapping[str, Any]]]],
) -> list[dict[str, Outcome]]:
    """The same for several programs at once; the first failure is raised."""
    found: list[dict[str, Outcome] | BaseException] = [{} for _ in programs]

    def one(number: int) -> None:
        try:
            found[number] = ask_rows(*programs[number])
        except Exception as error:  # noqa: BLE001 - raised again below
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes = []
    for each in found:
        if isinstance(each, BaseException):
            raise each
        outcomes.append(each)
    return outcomes
