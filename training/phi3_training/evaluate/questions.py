"""The questions for both models: held-out, trained and old chats, canaries, refusal probes.

Reads run/data/*.jsonl and the question files that the recipe names; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

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
        rows, limit = read_chats(run, part), settings.max_rows
        if limit is not None and len(rows) > limit:  # spread evenly: files are often sorted
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        questions += rows
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
    if len(places) != len(rows):  # of a large set, or of chats that were prepared otherwise
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
            number, row = raw.row or raw.line, raw.value
            try:
                messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
                # An earlier answer of weight 0 is not measured either.
                for message, written in zip(messages, row["messages"], strict=True):
                    message |= {} if written.get("weight", 1) else _CONTEXT
                accept = tuple(map(str, row.get("accept", ())))
            except (ValueError, TypeError, KeyError, AttributeError):
                raise StageError(
                    f'{path}:{number}: expected {{"messages": [{{"role", "content"}}, …]}}, and '
                    'optionally "accept": [texts, one of which the answer must contain]'
                ) from None
            answered = bool(messages) and messages[-1]["role"] != "user"
            expected = messages.pop()["content"] if answered else ""
            if not messages or messages[-1]["role"] != "user":
                raise StageError(
                    f"{path}:{number}: expected the last message to be a user's question"
                )
            questions.append(Question(part, number, messages, expected, accept))
    except OSError as error:
        raise StageError(f"{path} cannot be read ({error.strerror})") from None
    return questions
