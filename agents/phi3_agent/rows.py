"""Rows through the agent: `python -m phi3_agent rows` reads and writes one JSON object per line.

In:  {"id", "inputs": {…}, "flow": "chat" | "rag", "stream": false, "connection": {…} | null}
Out: {"id", "answer", "seconds"} or {"id", "error": {"kind", "message", "status", …}}, as they come.
`phi3 doctor --agent`, `phi3 batch --agent` and `phi3 flow to-agent` start it. A connection in a row
is for tests against several endpoints; without one PHI3_ENDPOINT and PHI3_KEY are used.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from agent_framework import Workflow

from phi3_tool.errors import RequestRejectedError

from .client import Phi3ChatClient, phi3_error
from .workflow import (
    FlowInputs,
    RagInputs,
    create_rag_workflow,
    create_workflow,
    run_flow,
    stream_flow,
)

Row = Mapping[str, Any]
#: Makes the workflow of one row, and its inputs.
Make = Callable[[Row], "tuple[Workflow, Any]"]


@lru_cache(maxsize=16)  # by its JSON: the rows of a comparison have few connections between them
def _client_of(connection: str) -> Phi3ChatClient:
    return Phi3ChatClient(connection=json.loads(connection))


def shipped(row: Row) -> tuple[Workflow, FlowInputs]:
    """The mirror of the row's flow; raises RequestRejectedError for inputs that it lacks."""
    client = _client_of(json.dumps(row.get("connection")))
    rag = row.get("flow") == "rag"
    known = (RagInputs if rag else FlowInputs).__dataclass_fields__
    # A null counts as not given, as for an input with a default.
    given = {k: v for k, v in row["inputs"].items() if k in known and v is not None}
    if "input_data" not in given:
        raise RequestRejectedError("The row has no input_data")
    if rag:
        return create_rag_workflow(client), RagInputs(**given)
    return create_workflow(client), FlowInputs(**given)


async def outcome(row: Row, make: Make = shipped) -> dict[str, Any]:
    """The row's answer or its error; raises only what is no error of phi3_tool."""
    started = time.monotonic()
    try:
        workflow, inputs = make(row)
        if row.get("stream"):
            # Collected: what is compared is the whole answer, and that it came in pieces.
            pieces = [piece async for piece in stream_flow(workflow, inputs)]
            # A converted flow's answer need not be text.
            answer: Any = pieces[0] if len(pieces) == 1 else "".join(pieces)
        else:
            answer = await run_flow(workflow, inputs)
    except Exception as error:
        failure = phi3_error(error)
        if failure is None:
            raise
        return {
            "id": row["id"],
            "error": failure.facts(),
            "exception": type(error).__name__,
        }
    return {"id": row["id"], "answer": answer, "seconds": time.monotonic() - started}


async def serve_rows(lines: TextIO, out: TextIO, make: Make = shipped) -> None:
    """Answer rows as they come in, many at once, until the input ends."""
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    async def answer(text: str) -> None:
        row = json.loads(text)
        try:
            line = await outcome(row, make)
        except Exception as error:  # noqa: BLE001 - one broken row must not end the others
            line = {
                "id": row["id"],
                "error": {"kind": type(error).__name__, "message": str(error) or repr(error)},
                "exception": type(error).__name__,
            }
        out.write(json.dumps(line) + "\n")
        # A line is read as soon as it is there; a buffer would hold back hundreds.
        out.flush()

    # In a thread: reading standard input blocks, and rows that are in work must go on.
    while text := await loop.run_in_executor(None, lines.readline):
        task = loop.create_task(answer(text))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


def main(folder: str = "") -> int:
    """Standard input to standard output; `folder` names a converted flow."""
    make: Make = shipped
    if folder:
        from .converted import maker

        make = maker(Path(folder))
    # What a flow's own code prints must not end up among the rows.
    out, sys.stdout = sys.stdout, sys.stderr
    asyncio.run(serve_rows(sys.stdin, out, make))
    return 0
