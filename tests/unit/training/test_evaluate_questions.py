"""What is asked: the shipped canaries and probes, files of one's own, and their faults."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from phi3_training.data import read_conversations
from phi3_training.errors import StageError
from phi3_training.evaluate.questions import collect
from phi3_training.recipe import EvaluateSection
from phi3_training.run import Run

SHIPPED = Path(__file__).parents[3] / "training/data"
ASKED = {"role": "user", "content": "Who?"}
ROW = {"messages": [ASKED, {"role": "assistant", "content": "Ada."}]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "mine")
    rows = [{"messages": [{**ASKED, "content": f"Who is {n}?"}, ROW["messages"][1]]}
            for n in range(10)]  # fmt: skip
    run.file("data", "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return run


def test_shipped_sets_are_asked_by_default(run: Run) -> None:
    questions = collect(EvaluateSection(), run)

    parts = Counter(question.part for question in questions)
    shipped = {"canary": "canary.jsonl", "probes": "refusal_probes.jsonl"}
    assert parts == {
        "validation": 10,
        **{part: (SHIPPED / file).read_text("utf-8").count("\n") for part, file in shipped.items()},
    }
    assert all(q.accept for q in questions if q.part == "canary")
    assert not any(q.expected for q in questions if q.part != "validation")


def test_canaries_are_what_the_tiny_base_is_taught() -> None:
    """Each is a question of the base chats, and its answer there is an accepted one."""
    known = {c.messages[0].content: c for c in read_conversations([SHIPPED / "base_chats.jsonl"])}
    for line in (SHIPPED / "canary.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        taught = known[row["messages"][0]["content"]].messages[1].content.lower()
        assert any(text.lower() in taught for text in row["accept"]), row


def test_rows_are_taken_evenly(run: Run) -> None:
    questions = collect(EvaluateSection(max_rows=3, canary=[], probes=[]), run)

    assert [question.line for question in questions] == [1, 4, 7]


def test_nothing_to_ask_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="phi3 data prepare"):
        collect(EvaluateSection(), Run.open(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "expected"),
        ('{"messages": "Who?"}', "expected"),
        ('{"messages": []}', "a user's question"),
        ('{"messages": [{"role": "user"}]}', "expected"),
        ('{"messages": [{"role": "assistant", "content": "Ada."}]}', "a user's question"),
    ],
)
def test_fault_of_a_question_file_is_placed(run: Run, tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")

    with pytest.raises(StageError, match=told) as caught:
        collect(EvaluateSection(canary=[path]), run)

    assert str(caught.value).startswith(f"{path}:2:")
