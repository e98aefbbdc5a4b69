"""The questions for both models: held-out, trained and old chats, canaries, refusal probes.

Reads run/data/*.jsonl and the question files that the recipe names; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.faults import Fault
from ..data.prepare import origins
from ..data.sources import rows_of
from ..errors import StageError
from ..finetune.rewordings import Conversation
from ..project import shipped_data
from ..recipe import EvaluateSection
from ..run import Run

_CONTEXT = {"weight": 0}
# In the order of the report: never trained on, trained on, older.
CHAT_PARTS = ("validation", "train", "replay")
PARTS = {
    "validation": "held-out chats, never trained on",
    "train": "chats it was fine-tuned on",
    "replay": "older chats mixed in",
    "canary": "general questions",
    "probes": "requests to refuse",
}


@dataclass(frozen=True)
class Question:
    """A conversation up to its last question; `expected` is empty where no one answer is right."""

    part: str
    line: int
    prompt: Conversation
    expected: str
    accept: tuple[str, ...] = ()
    origin: str = ""  # file and line that the user wrote, where they are known


def collect(settings: EvaluateSection, run: Run) -> list[Question]:
    """All questions. Raises StageError when there are none, or a question file has a fault."""
    questions: list[Question] = []
    for part in CHAT_PARTS:
        questions += _spread(read_chats(run, part), settings.max_rows)
    if not questions:
        raise StageError("There is nothing to evaluate; prepare the chats with: phi3 data prepare")
    for part, path in extra_files(settings):
        questions += [replace(q, origin=f"{path}:{q.line}") for q in _read(path, part)]
    return questions


def read_chats(run: Run, part: str) -> list[Question]:
    """All prepared chats of a part, each with its place in the user's file, if known."""
    path = run.path / "data" / f"{part}.jsonl"
    rows = _read(path, part) if path.is_file() else []
    places = origins(run.path, part)
    if len(places) != len(rows):
        return rows
    return [replace(row, origin=place) for row, place in zip(rows, places, strict=True)]


def extra_files(settings: EvaluateSection) -> list[tuple[str, Path]]:
    """The files of canaries and probes: the recipe's, else the shipped ones where they are."""
    shipped = {
        "canary": shipped_data("canary.jsonl"),
        "probes": shipped_data("refusal_probes.jsonl"),
    }
    named = {"canary": settings.canary, "probes": settings.probes}
    files = []
    for part, paths in named.items():
        path = shipped[part]
        default = [] if path is None else [path]
        files += [(part, path) for path in (default if paths is None else paths)]
    return files


def _read(path: Path, part: str) -> list[Question]:
    questions = []
    try:
        for raw in rows_of(path):
            if raw.problems:
                fault = Fault.at(path, raw.line, raw.problems[0], raw.row)
                raise StageError(f"{fault} (expected questions like the chats)")
            questions.append(_question(raw.value, part, path, raw.row or raw.line))
    except OSError as error:
        raise StageError(f"{path} cannot be read ({error.strerror})") from None
    return questions


def _question(row: Any, part: str, path: Path, number: int) -> Question:
    try:
        # An earlier answer of weight 0 is not measured either.
        messages = [
            {"role": m["role"], "content": m["content"], **({} if m.get("weight", 1) else _CONTEXT)}
            for m in row["messages"]
        ]
        accept = tuple(map(str, row.get("accept", ())))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise StageError(
            f'{path}:{number}: expected {{"messages": [{{"role", "content"}}, …]}}, and optionally '
            '"accept": [texts, one of which the answer must contain]'
        ) from None
    expected = messages.pop()["content"] if messages and messages[-1]["role"] != "user" else ""
    if not messages or messages[-1]["role"] != "user":
        raise StageError(f"{path}:{number}: expected the last message to be a user's question")
    return Question(part, number, messages, expected, accept)


def _spread(rows: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` rows, spread evenly over the file."""
    if limit is None or len(rows) <= limit:
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]
