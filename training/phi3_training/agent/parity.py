"""The same rows through Prompt flow and through the agent, and what differs.

Both ask a recording endpoint on this machine. Requests are compared byte by byte with the headers
that mean something, answers and errors as they are. A row that one side did not answer is a
difference; the key is made up for the comparison.
"""

from __future__ import annotations

import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError
from ..flow.bundle import copy_flow
from ..flow.page import quiet_home
from ..flow.source import FlowSource
from ..packages import installed
from ..project import FLOW, RAG_FLOW, find
from .environment import agent_python, command, environment
from .golden import DOCUMENTS, FlowKind, GoldenRow
from .recorder import Recorder, Request, first_difference
from .worker import Outcome, Program, ask_both

PROMPT_FLOW, AGENT = "promptflow", "agent"
_FLOWS: dict[FlowKind, Path] = {"chat": FLOW, "rag": RAG_FLOW}
# Ids are drawn again for each request, and the port is where the recorder happened to listen.
_VARYING = re.compile(r"127\.0\.0\.1:\d+/(?:promptflow|agent)/")


@dataclass(frozen=True)
class Compared:
    """One row: how many requests it took, and what differs first; empty where nothing does."""

    name: str
    requests: int
    difference: str = ""
    error: str = ""  # the kind of error that both sides ended with

    @property
    def said(self) -> str:
        """For the report."""
        if self.difference:
            return self.difference
        many = f"{self.requests} request{'s' * (self.requests != 1)}, same bytes"
        return f"{many if self.requests else 'no request'}; same {self.error or 'answer'}"


def compare(
    rows: Sequence[GoldenRow],
    *,
    flow: Path | None = None,
    folder: str = "",
) -> Iterator[Compared]:
    """Each row's comparison, in order.

    `flow` takes the place of the shipped chat flow, and `folder` (a converted flow) that of its
    mirror. Raises MissingExtraError without Prompt flow, StageError without the agent's environment
    and where a side breaks.
    """
    if installed("promptflow") is None:
        raise MissingExtraError("promptflow", "flow")
    python = agent_python()
    # Made up: what is recorded and compared must hold no real one.
    key = secrets.token_urlsafe(16)
    names = {str(number): row for number, row in enumerate(rows)}
    recorder = Recorder({number: row.replies for number, row in names.items()})
    with _prepared(rows, flow) as (flows, home), recorder.running():

        def row_of(side: str, number: str, row: GoldenRow) -> dict[str, Any]:
            address = recorder.address(side, number, row.dialect)
            return {
                "id": number,
                "flow": row.flow,
                "inputs": dict(row.inputs),
                "stream": row.stream,
                "connection": {"endpoint": address, "key": key, **row.settings},
            }

        words = ["rows", folder] if folder else ["rows"]
        index = {"PHI3_INDEX": str(flows["rag"] / "index.sqlite")} if "rag" in flows else {}
        agent = Program("The agent", command(python, words), environment({}, index))
        quiet = {
            "PF_HOME_DIRECTORY": str(home),
            # No spans, and so no service that collects them.
            "PF_DISABLE_TRACING": "true",
            "PF_LOGGING_LEVEL": "CRITICAL",
        }
        named = [f"{kind}={path}" for kind, path in flows.items()]
        # A process of its own on both sides: Prompt flow and Agent Framework need different
        # opentelemetry.
        flow_words = [sys.executable, "-m", "phi3_training.flow.rows", *named]
        promptflow = Program("Prompt flow", flow_words, environment({}, {**quiet, **index}))
        before, ours = ask_both(
            (promptflow, [row_of(PROMPT_FLOW, n, row) for n, row in names.items()]),
            (agent, [row_of(AGENT, n, row) for n, row in names.items()]),
        )
        for number, row in names.items():
            asked = (recorder.requests(PROMPT_FLOW, number), recorder.requests(AGENT, number))
            yield compared(row.name, asked, (before.get(number), ours.get(number)))


def compared(
    name: str,
    requests: tuple[Sequence[Request], Sequence[Request]],
    outcomes: tuple[Outcome | None, Outcome | None],
) -> Compared:
    """One row's comparison; in each pair Prompt flow comes first, then the agent."""
    (asked, theirs), (flow, agent) = requests, outcomes
    if flow is None or agent is None:
        missing = " and ".join(
            side for side, each in (("Prompt flow", flow), ("the agent", agent)) if each is None
        )
        return Compared(name, len(asked), f"no outcome from {missing}")
    # The first difference alone: those after it follow from it.
    for place, (one, other) in enumerate(zip(asked, theirs, strict=False), 1):
        if difference := one.difference(other):
            return Compared(name, len(asked), f"request {place}: {difference}")
    if len(asked) != len(theirs):
        return Compared(name, len(asked), f"{len(asked)} and {len(theirs)} requests")
    error = str(flow.error["kind"]) if flow.error else ""
    return Compared(name, len(asked), _outcome_difference(flow, agent), error)


def _outcome_difference(flow: Outcome, agent: Outcome) -> str:
    if (flow.error is None) != (agent.error is None):
        one, other = (
            f"{each.error['kind']}: {each.error['message']}" if each.error else "an answer"
            for each in (flow, agent)
        )
        return f"{one} and {other}"
    if flow.error is not None and agent.error is not None:
        # Not the request id, which is drawn for each request.
        for fact in ("kind", "message", "status", "inner_status", "reason", "attempts"):
            one, other = (
                _VARYING.sub("", str((each.error or {}).get(fact))) for each in (flow, agent)
            )
            if one != other:
                return f"error {fact}: {first_difference(one, other)}"
        return ""
    if flow.answer == agent.answer:
        return ""
    # A note that an answer was cut off names its request.
    one, other = (
        re.sub("request id [0-9a-f-]{36}", "", _VARYING.sub("", str(each.answer)))
        for each in (flow, agent)
    )
    difference = first_difference(one, other)
    return f"answer {difference}" if difference else ""


@contextmanager
def _prepared(
    rows: Sequence[GoldenRow], flow: Path | None
) -> Iterator[tuple[dict[FlowKind, Path], Path]]:
    """Copies of the flows that are needed, one with an index, and a Prompt flow home of its own."""
    with tempfile.TemporaryDirectory(prefix="phi3-agent-") as name:
        scratch = Path(name)
        flows: dict[FlowKind, Path] = {}
        for kind in sorted({row.flow for row in rows}):
            source = FlowSource.read(flow if kind == "chat" and flow else find(_FLOWS[kind]))
            flows[kind] = scratch / kind / source.name
            copy_flow(source, flows[kind])
        if "rag" in flows:
            # `phi3 rag index` leaves the user's own documents in the flow.
            for own in ("index.sqlite", "index.json"):
                (flows["rag"] / own).unlink(missing_ok=True)
            from ..progress import no_progress
            from ..rag.build import choose_embedder, sync

            documents = scratch / "documents"
            documents.mkdir()
            for file, text in DOCUMENTS.items():
                (documents / file).write_text(text, encoding="utf-8")
            # Words alone: the comparison needs no weights, and both sides read the same file.
            by_words = choose_embedder("none", no_progress)
            sync(flows["rag"] / "index.sqlite", [documents], by_words, no_progress)
        yield flows, quiet_home(scratch)
