"""The shipped handbook and its questions: sound, as many as promised, without contradictions."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from phi3_training.rag.documents import Section, read_sections
from phi3_training.rag.questions import Question, holds, read_questions

FOLDER = Path(__file__).parents[3] / "training" / "data"
HANDBOOK = FOLDER / "handbook"
SOURCES = FOLDER / "handbook_sources"
PAGES = sorted(HANDBOOK.iterdir())
QUESTIONS = read_questions(FOLDER / "handbook_questions.jsonl")
CHANGES: list[dict[str, str]] = json.loads((FOLDER / "handbook_changes.json").read_text("utf-8"))
#: Of each unanswerable question, what the handbook would have to say, as a pattern of one passage.
MISSING = {
    "unanswerable-01": "surf",
    "unanswerable-02": "paragli",
    "unanswerable-03": r"fishing|\brods?\b",
    "unanswerable-04": "password|wireless|wi-?fi",
    "unanswerable-05": "sauna",
    "unanswerable-06": "binocular",
    "unanswerable-07": "horse|riding",
    "unanswerable-08": "bitcoin",
    "unanswerable-09": r"\bkni(fe|ves)|sharpen",
    "unanswerable-10": "solar",
    "unanswerable-11": "hotel",
    "unanswerable-12": "archery",
    "unanswerable-13": "drone",
    "unanswerable-14": "insurance",
    "unanswerable-15": "scooter",
    "unanswerable-16": r"cloudlatch[^|.]*\b(kilo|gram|weigh)",
    "unanswerable-17": r"nestdown[^|.]*\b(color|brown|white|gray|green|red|blue)",
    "unanswerable-18": r"weaver's hut[^.]*breakfast|breakfast[^.]*weaver's hut",
    "unanswerable-19": r"wilma[^.|]*\b(old|age|born|years)\b",
    "unanswerable-20": r"\bvan\b[^.]*\bseats\b|\bseats\b[^.]*\bvan\b",
}


@cache
def sections(name: str) -> tuple[Section, ...]:
    return tuple(read_sections(HANDBOOK / name))


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def rows_of(kind: str) -> list[Question]:
    return [question for question in QUESTIONS if question.kind == kind]


def test_the_handbook_has_the_pages_that_the_readme_counts() -> None:
    kinds = Counter(page.suffix for page in PAGES)
    assert kinds == {".md": 48, ".pdf": 6, ".docx": 5}
    assert "48 in Markdown, 6 in PDF, 5 in DOCX" in (FOLDER / "README.md").read_text("utf-8")
    assert sum(page.stat().st_size for page in PAGES) < 400_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short_and_plain(page: Path) -> None:
    text = " ".join(section.text for section in sections(page.name))
    assert 140 <= len(text.split()) <= 450
    assert text.isascii()


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.md")), ids=lambda path: path.stem)
def test_pdf_and_docx_pages_are_made_from_their_texts(source: Path) -> None:
    read = sections(source.stem)
    # The title of a PDF is on its first page as well.
    titles = {title for section in read for title in section.heading if section.page is None}
    written = source.read_text("utf-8").replace("\n---\n", "\n")
    assert words(" ".join((*titles, *(section.text for section in read)))) == words(written)


def test_questions_are_counted_and_split() -> None:
    assert len({question.id for question in QUESTIONS}) == len(QUESTIONS) == 150
    assert len({question.text for question in QUESTIONS}) == 150
    assert Counter((question.kind, question.split) for question in QUESTIONS) == {
        ("plain", "train"): 44,
        ("plain", "test"): 26,
        ("paraphrased", "train"): 31,
        ("paraphrased", "test"): 19,
        ("unanswerable", "train"): 12,
        ("unanswerable", "test"): 8,
        ("changed", "train"): 3,
        ("changed", "test"): 7,
    }


def test_every_page_but_a_few_is_asked_about() -> None:
    asked = {question.source for question in QUESTIONS if question.answerable}
    assert asked <= {page.name for page in PAGES}
    assert len(asked) >= 55


def test_no_fact_is_asked_for_twice() -> None:
    """What is trained on must not be the answer of another question that is held out."""
    facts = [(q.source, q.heading, q.answer) for q in QUESTIONS if q.answerable]
    assert len(facts) == len(set(facts))


def test_no_question_is_one_of_the_shipped_chats() -> None:
    asked = {
        message["content"].lower()
        for path in FOLDER.glob("*_chats*.jsonl")
        for line in path.read_text("utf-8").splitlines()
        for message in json.loads(line)["messages"]
    }
    assert not [question.text for question in QUESTIONS if question.text.lower() in asked]


@pytest.mark.parametrize(
    "question", [q for q in QUESTIONS if q.answerable], ids=lambda question: question.id
)
def test_the_answer_stands_where_the_question_says(question: Question) -> None:
    assert question.source is not None
    there = [
        section
        for section in sections(question.source)
        if question.page in (None, section.page)
        and question.heading in (None, *section.heading)
        and holds(section.text, question.answer)
    ]
    assert len(there) == 1


def test_what_cannot_be_answered_stands_nowhere() -> None:
    assert MISSING.keys() == {question.id for question in rows_of("unanswerable")}
    assert not any(question.answerable for question in rows_of("unanswerable"))
    for page in PAGES:
        for section in sections(page.name):
            text = " ".join(f"{' '.join(section.heading)}. {section.text}".lower().split())
            found = [name for name, pattern in MISSING.items() if re.search(pattern, text)]
            assert not found, page.name


def test_a_paraphrased_question_does_not_use_the_words_of_its_passage() -> None:
    """At most one word of five letters or more in common, on average."""
    common = []
    for question in rows_of("paraphrased"):
        long = {word for word in words(question.text) if len(word) >= 5}
        held = [s for s in sections(question.source or "") if holds(s.text, question.answer)]
        common.append(len(long & set(words(" ".join((*held[0].heading, held[0].text))))))
    assert sum(common) / len(common) <= 1


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change["id"]))
def test_a_change_edits_one_place(change: dict[str, Any]) -> None:
    (question,) = (q for q in QUESTIONS if q.id == change["id"])
    assert (question.kind, question.source) == ("changed", change["file"])
    pages = [page.read_text("utf-8") for page in HANDBOOK.glob("*.md")]
    assert sum(text.count(change["old"]) for text in pages) == 1
    assert holds(change["old"], question.answer)
    assert holds(change["new"], change["answer"])
    assert not holds(change["new"], question.answer)
    # The fact is one of those that the shipped chats teach: a tuned model has learnt the old one.
    chats = (FOLDER / "outdoor_chats.jsonl").read_text("utf-8")
    assert f"{question.answer}. Happy trails!" in chats


def test_each_changed_question_has_its_change() -> None:
    assert [question.id for question in rows_of("changed")] == [c["id"] for c in CHANGES]
