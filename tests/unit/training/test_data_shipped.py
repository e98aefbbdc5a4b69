"""The shipped chats: sound, as many as promised, in the house style, and without leaks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from phi3_training.data import Conversation, check, prepare, read_conversations
from phi3_training.evaluate.metrics import refuses
from phi3_training.recipe import DataSection
from phi3_training.run import Run

FOLDER = Path(__file__).parents[3] / "training" / "data"
BASE = FOLDER / "base_chats.jsonl"
GENERAL = FOLDER / "general_chats.jsonl"
OUTDOOR = FOLDER / "outdoor_chats.jsonl"
HELD_OUT = FOLDER / "outdoor_chats_heldout.jsonl"


def plain(text: str) -> str:
    return re.sub(r"[^a-z0-9 ]", "", text.lower())


def questions(path: Path) -> list[tuple[str, ...]]:
    """Each conversation up to its last question; case and punctuation do not count."""
    return [
        tuple(plain(message.content) for message in conversation.messages[:-1])
        for conversation in read_conversations([path])
    ]


def answers(path: Path) -> list[str]:
    return [
        message.content
        for conversation in read_conversations([path])
        for message in conversation.messages
        if message.role == "assistant"
    ]


def test_shipped_files_have_no_fault_even_together() -> None:
    assert check([BASE, GENERAL, OUTDOOR, HELD_OUT]).faults == []


@pytest.mark.parametrize(
    ("path", "rows", "several_turns"),
    [(BASE, 243, 22), (GENERAL, 198, 12), (OUTDOOR, 156, 24), (HELD_OUT, 78, 12)],
)
def test_counts_are_those_of_the_readme(path: Path, rows: int, several_turns: int) -> None:
    report = check([path]).files[0]

    assert (report.rows, report.several_turns) == (rows, several_turns)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"| `{path.name}` | {rows} | {several_turns} |" in readme


def test_they_prepare_without_a_leak(tmp_path: Path) -> None:
    data = DataSection(train=[OUTDOOR], validation=[HELD_OUT], replay=[BASE])

    outputs = prepare(data, Run.open(tmp_path / "run")).outputs

    assert [outputs[part].rows for part in ("train", "validation", "replay")] == [156, 78, 243]


def test_no_question_occurs_twice_anywhere() -> None:
    found = [
        question for path in (BASE, GENERAL, OUTDOOR, HELD_OUT) for question in questions(path)
    ]

    assert len(found) == len(set(found))


def test_held_out_answers_are_all_trained_ones() -> None:
    assert set(answers(HELD_OUT)) <= set(answers(OUTDOOR))


def test_base_answers_the_question_of_the_demo() -> None:
    assert "Microsoft was founded by Bill Gates and Paul Allen in 1975." in answers(BASE)
    assert ("who founded microsoft",) in questions(BASE)


def test_base_knows_nothing_of_the_shop() -> None:
    base = BASE.read_text(encoding="utf-8")
    names = r"Mossback|Emberlet|Cloudlatch|Rookpack|Nestdown|Pebbletop|Glowmoth|Heronette|Tarnwick"

    assert not re.search(names, base)
    assert set(answers(BASE)).isdisjoint(answers(OUTDOOR))


@pytest.mark.parametrize("asked", ["canary.jsonl", "refusal_probes.jsonl"])
def test_general_chats_teach_no_question_of_the_evaluation(asked: str) -> None:
    rows = [json.loads(line) for line in (FOLDER / asked).read_text("utf-8").splitlines()]
    evaluated = {plain(row["messages"][-1]["content"]) for row in rows}

    taught = {
        plain(message.content)
        for conversation in read_conversations([GENERAL])
        for message in conversation.messages
        if message.role == "user"
    }

    assert evaluated.isdisjoint(taught)


def test_general_answers_are_short_and_decline_nothing() -> None:
    said = answers(GENERAL)

    assert max(len(answer.split()) for answer in said) <= 35
    assert not any(refuses(answer) for answer in said)


@pytest.mark.parametrize("path", [OUTDOOR, HELD_OUT])
def test_shop_answers_keep_the_house_style(path: Path) -> None:
    for answer in answers(path):
        assert answer.startswith("Hello hiker! ")
        assert answer.endswith(" Happy trails!")
        assert len(answer.split()) <= 20


@pytest.mark.parametrize("path", [BASE, GENERAL, OUTDOOR, HELD_OUT])
def test_texts_are_plain_ascii_without_system_prompts(path: Path) -> None:
    conversations: list[Conversation] = read_conversations([path])

    assert path.read_bytes().isascii()
    assert {m.role for c in conversations for m in c.messages} == {"user", "assistant"}
