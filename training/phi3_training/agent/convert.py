"""`phi3 flow to-agent`: a flow of Python and prompt nodes as a folder for Agent Framework.

Reads a flow folder and the user's rows; writes a folder with the nodes as they were, flow.json and
agent.py, after both have been asked the same rows and sent and answered the same. Otherwise nothing
is left.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import StageError, UsageError
from ..flow.source import DAG, FlowSource, connection_inputs, tool_function
from .golden import GoldenRow
from .parity import Compared, compare

FLOW = "flow.json"
_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\.?(.*)\}")
_SHOWN = 5

# Short: what a person reads and changes; the running is in phi3_agent.converted.
_AGENT = '''\
"""The flow {name} on Microsoft Agent Framework; written by `phi3 flow to-agent`.

Run it with the Python that has Agent Framework and phi3_agent (`make agent`), with PHI3_ENDPOINT
and PHI3_KEY set (`eval "$(phi3 env)"`):

    python agent.py "A question"
"""

import sys
from pathlib import Path

from phi3_agent.converted import load, main
from phi3_agent.converted import create_workflow as _create_workflow

FOLDER = Path(__file__).resolve().parent


def create_workflow():
    """A workflow for one request: give it `phi3_agent.converted.State`."""
    return _create_workflow(load(FOLDER))


if __name__ == "__main__":
    sys.exit(main(FOLDER, sys.argv[1:]))
'''


@dataclass(frozen=True)
class Converted:
    """What was written, and how it was proved."""

    folder: Path
    files: tuple[str, ...]
    rows: int
    requests: int


class Prove(Protocol):
    """What asks both sides: `parity.compare`."""

    def __call__(
        self, rows: Sequence[GoldenRow], *, flow: Path | None = None, folder: str = ""
    ) -> Iterator[Compared]:
        """Each row's comparison."""
        ...


def convert(flow: Path, data: Path, out: Path, prove: Prove = compare) -> Converted:
    """Convert `flow`, prove it on the rows of `data`, then put it at `out`.

    Raises UsageError with everything that cannot be converted, each with its node, and for rows
    that lack an input; StageError where the two sides differ, with the first difference.
    """
    source = FlowSource.read(flow)
    if out.exists():
        raise UsageError(f"{out} exists; name another folder with --out, or remove it")
    written = describe(source)
    rows = rows_of(data, written["inputs"])
    # Files that the nodes read at run time are not followed; phi3_tool comes with the agent.
    files = source.files(carry_tool=False)
    with tempfile.TemporaryDirectory(prefix="phi3-to-agent-") as scratch:
        folder = Path(scratch) / "agent"
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        # A flow of package tools alone has no file to copy.
        folder.mkdir(exist_ok=True)
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (folder / FLOW).write_text(text, encoding="utf-8")
        (folder / "agent.py").write_text(_AGENT.format(name=source.name), encoding="utf-8")
        compared = list(prove(rows, flow=flow, folder=str(folder)))
        different = [row for row in compared if row.difference]
        if different:
            shown = "\n  ".join(f"{row.name}: {row.difference}" for row in different[:_SHOWN])
            raise StageError(
                f"The converted flow {source.name} differs from Prompt flow in {len(different)} of "
                f"{len(compared)} rows, so nothing was written:\n  {shown}"
            )
        # Two sides that fail in the same way agree as well, and prove nothing.
        failed = [row for row in compared if row.error]
        if len(failed) == len(compared):
            raise StageError(
                f"Prompt flow itself answers no row of {source.name} ({failed[0].error} in "
                f"{failed[0].name}), so nothing is proved and nothing was written"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        # Only now: a folder that is there has been compared.
        shutil.move(folder, out)
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*") if p.is_file())
    return Converted(out, tuple(names), len(rows), sum(row.requests for row in compared))


def describe(source: FlowSource) -> dict[str, Any]:
    """flow.json: inputs, nodes in the order in which they run, and what the answer is.

    Raises UsageError with every node that cannot be converted, and why.
    """
    faults: list[str] = []
    nodes = [node for node in source.dag["nodes"] if isinstance(node, dict)]
    connections = connection_inputs(source)
    for node in nodes:
        faults += [f"node {node.get('name')}: {fault}" for fault in _faults(source, node)]
    for variant in source.dag.get("node_variants") or {}:
        faults.append(f"node {variant}: variants; keep one and put it under nodes")
    named = {
        str(node["inputs"][name])
        for node in nodes
        for name in connections.get(str(node.get("name")), ())
    }
    if len(named) > 1:
        faults.append(
            f"several connections ({', '.join(sorted(named))}): an agent asks one endpoint"
        )
    outputs = source.dag.get("outputs") or {}
    # The chat output is the answer, else the first one.
    chat = [name for name, about in outputs.items() if about.get("is_chat_output")] or list(outputs)
    if not chat:
        faults.append(f"{DAG} names no output, which would be the answer")
    if not faults:
        ordered = _ordered(nodes, faults)
    if faults:
        raise UsageError(f"{source.folder} cannot be converted:\n  " + "\n  ".join(faults))
    inputs: dict[str, dict[str, Any]] = {}
    for name, about in (source.dag.get("inputs") or {}).items():
        inputs[name] = {"type": about.get("type", "string")}
        if about.get("default") is not None:  # a null default is none, as in Prompt flow
            inputs[name]["default"] = about["default"]
        if about.get("is_chat_input"):
            inputs[name]["chat_input"] = True
    described: list[dict[str, Any]] = []
    for ready in ordered:
        name, path = str(ready["name"]), str(ready["source"]["path"])
        linked = list(connections.get(name, ()))
        given = {key: v for key, v in (ready.get("inputs") or {}).items() if key not in linked}
        function = tool_function(source.folder / path) if ready["type"] == "python" else None
        described.append(
            {
                "name": name,
                "type": str(ready["type"]),
                "path": path,
                "inputs": given,
                "connections": linked,
                **({"function": function.name} if function else {}),
            }
        )
    return {
        "name": source.name,
        "inputs": inputs,
        "nodes": described,
        "answer": outputs[chat[0]]["reference"],
    }


def rows_of(path: Path, inputs: Mapping[str, Mapping[str, Any]]) -> list[GoldenRow]:
    """The flow's inputs in each line of a JSONL file; raises UsageError with every fault.

    Each row is asked whole by /score and streamed in OpenAI's dialect.
    """
    # Both sides are asked the same rows, so a missing input is found before either starts.
    needed = [name for name, about in inputs.items() if "default" not in about]
    faults, rows = [], []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            faults.append(f"{path}:{number}: not a JSON object")
            continue
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            faults.append(f"{path}:{number}: no {', '.join(missing)}; it has {', '.join(row)}")
        given = {name: row[name] for name in inputs if row.get(name) is not None}
        rows.append(GoldenRow(f"line {number}", given))
        rows.append(GoldenRow(f"line {number}, streamed", given, stream=True, dialect="openai"))
    if faults or not rows:
        shown = "\n  ".join(faults[:_SHOWN]) or "it has no lines"
        raise UsageError(f"{path} has faults, so nothing was converted:\n  {shown}")
    return rows


def _faults(source: FlowSource, node: Mapping[str, Any]) -> Iterator[str]:
    """Why a node cannot be converted."""
    # What an agent has no counterpart for is refused by name, never left out.
    kind, about = str(node.get("type")), node.get("source") or {}
    if kind not in ("python", "prompt"):
        yield f"type {kind}; only python and prompt can be converted"
        return
    if about.get("type") != "code":
        yield f"its tool {about.get('tool', '')} is in a package; call it from a Python node"
        return
    for key, what in (("activate", "a condition"), ("use_variants", "variants")):
        if node.get(key):
            yield f"{key}: {what}"
    if node.get("aggregation"):
        yield "aggregation: it works on all rows of a run, not on a question"
    path = source.folder / str(about.get("path"))
    if not path.is_file():
        yield f"{about.get('path')} is not in {source.folder}"
    elif kind == "python":
        try:
            if tool_function(path) is None:
                yield f"{about['path']} has no function with @tool"
        except SyntaxError as error:
            yield f"{about['path']} is not Python: {error}"
    for name, value in (node.get("inputs") or {}).items():
        reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if reference and reference[1] == "flow":
            yield f"its input {name} is {value}, an old form; write ${{inputs.…}}"
        elif reference and reference[1] != "inputs" and not reference[2].startswith("output"):
            yield f"its input {name} is {value}; only outputs of nodes can be used"


def _ordered(nodes: Sequence[Mapping[str, Any]], faults: list[str]) -> list[Mapping[str, Any]]:
    """The nodes so that each comes after those whose outputs it takes."""
    names = {str(node["name"]) for node in nodes}
    waiting, ordered = list(nodes), list[Mapping[str, Any]]()
    done: set[str] = set()
    while waiting:
        ready = [node for node in waiting if _taken(node) & names <= done]
        if not ready:
            shown = ", ".join(str(node["name"]) for node in waiting)
            faults.append(f"nodes {shown}: each waits for another")
            return []
        ordered += ready
        done |= {str(node["name"]) for node in ready}
        waiting = [node for node in waiting if node not in ready]
    for node in nodes:
        unknown = sorted(_taken(node) - names - {"inputs"})
        if unknown:
            faults.append(f"node {node['name']}: there is no node {', '.join(unknown)}")
    return ordered


def _taken(node: Mapping[str, Any]) -> set[str]:
    """The nodes whose outputs a node takes; and `inputs`."""
    values = (node.get("inputs") or {}).values()
    matches = (_REFERENCE.fullmatch(value) for value in values if isinstance(value, str))
    return {match[1] for match in matches if match}
