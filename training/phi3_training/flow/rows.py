"""Rows through Prompt flow: `python -m phi3_training.flow.rows NAME=FLOW …`, one object per line.

In:  {"id", "flow": NAME, "inputs": {…}, "stream": false, "connection": {"endpoint", "key", …}}
Out: {"id", "answer"} or {"id", "error": {"kind", "message", "status", …}}, one after the other.
The same form as `python -m phi3_agent rows`, so that the two can be compared. Every connection that
a node names becomes the row's; Prompt flow's store is not opened.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_tool.errors import Phi3Error

from .ask import phi3_error_in
from .source import FlowSource, connection_inputs

Row = Mapping[str, Any]


class Flow:
    """A flow folder, asked row by row."""

    def __init__(self, folder: Path) -> None:
        source = FlowSource.read(folder)
        self._nodes = connection_inputs(source)
        outputs = source.dag.get("outputs") or {}
        chat = [name for name, about in outputs.items() if about.get("is_chat_output")]
        self._output = (chat or list(outputs))[0]
        self._flow = importlib.import_module("promptflow.client").load_flow(folder)
        self._entities = importlib.import_module("promptflow.entities")
        self._promptflow_error = importlib.import_module(
            "promptflow.exceptions"
        ).PromptflowException

    def outcome(self, row: Row) -> dict[str, Any]:
        """The row's answer or its error; raises only what is not the flow's."""
        given = {name: value for name, value in row["inputs"].items() if value is not None}
        try:
            settings: Mapping[str, Any] = row["connection"]
            configs = {name: str(value) for name, value in settings.items() if name != "key"}
            connection = self._entities.CustomConnection(
                name="row", configs=configs, secrets={"key": str(settings["key"])}
            )
            self._flow.context = self._entities.FlowContext(
                connections={
                    node: dict.fromkeys(inputs, connection) for node, inputs in self._nodes.items()
                },
                streaming=bool(row.get("stream")),
            )
            answer = self._flow(**given)[self._output]
            # A streamed answer comes as a generator.
            text = answer if not hasattr(answer, "__next__") else "".join(answer)
        except (self._promptflow_error, Phi3Error) as error:
            inner = phi3_error_in(error)
            if inner is not None:
                return {"id": row["id"], "error": inner.facts()}
            cause: BaseException = error  # the innermost one, such as an exception of the node
            while (
                deeper := getattr(cause, "inner_exception", None) or cause.__cause__
            ) is not None:
                cause = deeper
            facts = {"kind": type(cause).__name__, "message": str(cause)}
            return {"id": row["id"], "error": facts}
        return {"id": row["id"], "answer": text}


def main() -> int:
    """Standard input to standard output."""
    # What a flow's own code and Prompt flow print must not end up among the rows.
    out, sys.stdout = sys.stdout, sys.stderr
    named = (word.split("=", 1) for word in sys.argv[1:])
    flows = {name: Flow(Path(folder)) for name, folder in named}
    for text in sys.stdin:
        row = json.loads(text)
        out.write(json.dumps(flows[row["flow"]].outcome(row)) + "\n")
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
