"""Documents to training rows: what templates ask, and that a row is the prompt of serving."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from phi3_tool.grounding import NOT_IN_DOCUMENTS, grounded
from phi3_tool.index import DocumentIndex, Hit, hits_of
from phi3_training.data import check
from phi3_training.errors import UsageError
from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, sync
from phi3_training.rag.chats import Chat, Making, make_chats, write_chats
from phi3_training.rag.questions import Question, answers_of, read_questions, right_passages
from phi3_training.rag.templates import Templates

TENTS = """# Tents

The Mossback tent costs 240 dollars. It dries on the line within a single afternoon.

| Tent | Weight | Colors |
|---|---|---|
| Mossback | two kilos | green |
| Fernling | 980 grams | gray |

## Who may camp here?

Anybody with a card of the badger club may camp in the courtyard.
"""
RETURNS = "# Returns\n\nUnused goods come back within 60 days for a full refund at the till."
# So that a word of the two pages above is rare.
OTHERS = {
    "stoves": "The Emberlet stove burns gas and boils a liter of water in four minutes.",
    "boots": "Leather boots want wax twice a year, and a dry place away from the oven.",
    "maps": "The map of the Hallow valley shows every spring and every hut above the river.",
    "ropes": "Ropes older than ten years are cut into dog leashes by Rosalind.",
    "cafe": "The cafe bakes an oat cake whose recipe is pinned next to the coffee machine.",
    "bikes": "Cargo bikes stand beside the mill gate and take eighty kilograms of luggage.",
    "lamps": "The Glowworm lamp shines for thirty hours and charges over a cable.",
    "dogs": "Dogs on a leash are welcome on both floors, though not under the climbing wall.",
}
QUESTIONS = [
    {"question": "Price of a Mossback?", "answer": "Hello! It costs 240 dollars.",
     "source": "tents.md", "split": "train"},
    {"question": "Until when may unused goods come back?", "answer": "Within 60 days.",
     "source": "returns.md", "split": "test"},
    {"question": "Is the Mossback tent made of leather?", "kind": "unanswerable",
     "split": "train"},
]  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> DocumentIndex:
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "tents.md").write_text(TENTS, encoding="utf-8")
    (folder / "returns.md").write_text(RETURNS, encoding="utf-8")
    for name, text in OTHERS.items():
        (folder / f"{name}.md").write_text(f"# {name.title()}\n\n{text}\n", encoding="utf-8")
    sync(tmp_path / "index.sqlite", [folder], Chosen(None, {}, ""), no_progress)
    return DocumentIndex(tmp_path / "index.sqlite")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in QUESTIONS), encoding="utf-8")
    return path


def made(index: DocumentIndex, questions: Path | None = None, **making: object) -> list[Chat]:
    own = read_questions(questions) if questions else []
    return make_chats(index, None, own, Making(**making), no_progress)  # type: ignore[arg-type]


def test_templates_ask_headings_tables_and_sentences(index: DocumentIndex) -> None:
    passages = index.passages()
    templates = Templates(passages)
    pairs = {
        pair.question: pair.answer
        for hit in passages
        for pair in templates.pairs(hit, random.Random(0), 99)  # noqa: S311
    }
    assert pairs["What does the Mossback tent cost?"] == "240 dollars"
    assert pairs["Who may camp here?"].startswith("Anybody with a card")
    assert pairs['What do you say under "Returns"?'].startswith("Unused goods")
    weights = {answer for question, answer in pairs.items() if "weight" in question}
    assert weights == {"980 grams", "two kilos"}
    number = next(question for question in pairs if "how many days" in question)
    assert (number, pairs[number]) == (
        "Returns: how many days, Unused goods back refund?",
        "60 days",
    )
    words = next(question for question in pairs if question.startswith("Tents: dries"))
    assert pairs[words] == "It dries on the line within a single afternoon."


def test_a_row_is_the_prompt_of_serving(index: DocumentIndex) -> None:
    rows = [chat for chat in made(index, withheld=0.0) if chat.kind == "passages"]
    served = [
        grounded(question, [hit.as_lookup() for hit in index.search(question)])["text"]
        for question in (chat.prompt.rpartition("Question: ")[2] for chat in rows)
    ]
    # Of the others the passages are shuffled, or the search missed the right one.
    same = [chat.prompt == text for chat, text in zip(rows, served, strict=True)]
    assert 0 < sum(same) < len(rows)
    assert max(chat.prompt.count("\n\n[") for chat in rows) <= 4


def test_the_citation_names_the_passage_of_the_answer(index: DocumentIndex) -> None:
    for chat in made(index, withheld=0.0, with_plain=False, per_passage=9):
        answer, _, number = chat.answer.rpartition(" [")
        passage = chat.prompt.partition(f"\n\n[{number}")[2].partition("\n\n[")[0]
        assert answer in passage, chat


def test_withheld_rows_do_not_hold_the_answer(index: DocumentIndex, questions: Path) -> None:
    rows = [chat for chat in made(index, questions, withheld=0.9) if chat.kind == "withheld"]
    assert any(chat.prompt_id == "withheld-question-3-1" for chat in rows)  # the unanswerable one
    for chat in rows:
        assert chat.answer == NOT_IN_DOCUMENTS
        assert "Price of a Mossback?" not in chat.prompt or "costs 240" not in chat.prompt


def test_own_questions_have_two_prompts(index: DocumentIndex) -> None:
    asked = Question(1, "Stove, lamp or dogs?", "The stove", "stoves.md")
    making = Making(withheld=0.0, per_passage=0, with_plain=False)
    first, second = make_chats(index, None, [asked], making, no_progress)
    assert {first.prompt_id, second.prompt_id} == {"passages-question-1-1", "passages-question-1-2"}
    assert first.prompt != second.prompt
    passages = [
        {re.sub(r"^\[\d\] ", "", block) for block in chat.prompt.split("\n\n")}
        for chat in (first, second)
    ]
    assert passages[0] == passages[1]  # in another order


def test_test_questions_are_never_trained_on(index: DocumentIndex, questions: Path) -> None:
    rows = made(index, questions)
    assert not any("Until when" in chat.prompt for chat in rows)
    plain = {chat.prompt: chat.answer for chat in rows if chat.kind == "plain"}
    assert plain["Price of a Mossback?"] == "Hello! It costs 240 dollars."
    assert not any("made of leather" in prompt for prompt in plain)


def test_the_same_seed_gives_the_same_rows_that_data_check_takes(
    index: DocumentIndex, questions: Path, tmp_path: Path
) -> None:
    rows = made(index, questions, seed=7)
    assert rows == made(index, questions, seed=7)
    assert rows != made(index, questions, seed=8)
    counts = write_chats(rows, tmp_path / "chats.jsonl")
    assert sum(counts.values()) == len(rows)
    assert min(counts.values()) > 0
    report = check([tmp_path / "chats.jsonl"])
    assert report.faults == []
    assert report.files[0].rows == len(rows)


def test_right_passages_hold_the_answer_whatever_its_voice(
    index: DocumentIndex, questions: Path
) -> None:
    own = read_questions(questions)
    among = answers_of(own)
    found: list[Hit] = right_passages(own[0], index.passages(), among)
    assert {hit.heading for hit in found} == {"Tents"}
    assert right_passages(own[2], index.passages(), among) == []
    assert hits_of([found[0].as_lookup()]) == found


def test_documents_without_sentences_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 2 3")
    sync(tmp_path / "index.sqlite", [tmp_path / "a.txt"], Chosen(None, {}, ""), no_progress)
    with pytest.raises(UsageError, match="--questions FILE"):
        made(DocumentIndex(tmp_path / "index.sqlite"))
