"""Rewordings of a question: the same answer, other words, the same each time."""

from __future__ import annotations

import pytest

from phi3_training.finetune.rewordings import with_rewordings

QUESTION, ANSWER = "What do you charge for the full service?", "Full service is 95 pounds."


def row(question: str = QUESTION, answer: str = ANSWER) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def questions(count: int, seed: int = 42, question: str = QUESTION) -> list[str]:
    rows = with_rewordings([("chats.jsonl:1", row(question))], count, seed)
    return [messages[-2]["content"] for _, messages in rows]


def test_each_copy_asks_otherwise_and_is_answered_alike() -> None:
    rows = with_rewordings([("chats.jsonl:1", row())], 5, 42)
    asked = [messages[0]["content"] for _, messages in rows]
    assert len(set(asked)) == len(asked) == 6
    assert asked[0] == QUESTION
    assert {messages[1]["content"] for _, messages in rows} == {ANSWER}
    assert rows[1][0] == "chats.jsonl:1 (reworded, 1)"


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("How much is a basic service?", "What does a basic service cost?"),
        ("what's a brake bleed cost", "What do you charge for a brake bleed?"),
        ("New chain, how much?", "What's the price of new chain?"),
        ("How much to true a wheel?", "What does it cost to true a wheel?"),
        ("When do you close on a Saturday?", "At what time do you close on a Saturday?"),
        ("Where’s the workshop?", "Where do I find the workshop?"),
        ("How do I find you?", "What's your address?"),
        ("Who runs the place?", "Which of you runs the place?"),
        ("Hi there! Can you repair it?", "Hi there! Are you able to repair it?"),
        ("My brakes squeal. What would new pads cost?", "My brakes squeal. Price for new pads?"),
    ],
)
def test_a_question_is_put_in_the_usual_other_forms(question: str, other: str) -> None:
    assert other in questions(30, question=question)


def test_half_of_the_copies_are_other_forms_where_there_are_some() -> None:
    forms = set(questions(30)[1:]) & {
        "How much is the full service?",
        "What does the full service cost?",
        "What's the price of the full service?",
        "How much would I pay for the full service?",
        "Price for the full service?",
        "What is the cost of the full service?",
        "How much do you ask for the full service?",
        "I'm interested in the full service, how much is it?",
        "What do I pay for the full service?",
    }
    assert len(forms) == 9
    assert len(forms & set(questions(4)[1:])) == 2


def test_a_seed_gives_the_same_wordings_whatever_stands_around() -> None:
    assert questions(4) == questions(4)
    assert questions(6) != questions(6, seed=7)
    beside = with_rewordings([("a", row("Who?", "Ada.")), ("b", row())], 4, 42)
    assert [m[0]["content"] for p, m in beside if p.startswith("b")] == questions(4)


def test_more_wordings_than_ways_are_still_different() -> None:
    asked = questions(12)
    assert len(set(asked)) == len(asked) > 7


def test_only_the_last_question_changes() -> None:
    talk = [*row("Do you sell tents?", "We do."), *row()]
    for _, messages in with_rewordings([("a", talk)], 4, 42)[1:]:
        assert messages[:2] == talk[:2]
        assert messages[2]["content"] != QUESTION
        assert messages[3] == talk[3]


def test_a_question_of_one_word_loses_nothing() -> None:
    for asked in questions(6, question="Price?"):
        assert "price" in asked.lower()


def test_names_and_i_keep_their_capital() -> None:
    for asked in questions(6, question="Is Marek in today?"):
        assert "marek" in asked.lower()
    assert all(
        "i'd" not in text for text in questions(3, question="I'd like a tyre") if "," in text
    )


def test_none_changes_nothing() -> None:
    assert with_rewordings([("a", row())], 0, 42) == [("a", row())]
