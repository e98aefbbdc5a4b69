"""`phi3 batch --agent`: each line through the agent's workflow, many at once, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from phi3_tool.client import ChatReply
from phi3_tool.connection import ConnectionSettings

from ..batch import INPUTS, Ask, Line
from ..flow.page import environment_of
from .environment import agent_python, command, environment
from .worker import Program, RowProcess


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
