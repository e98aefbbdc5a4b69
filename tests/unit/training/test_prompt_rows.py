"""Rows to train on: casual copies and the refusals before anything is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from phi3_training.errors import StageError
from phi3_training.finetune.rewordings import casual_copy, with_casual_copies
from phi3_training.finetune.rows import (
    Located,
    audited,
    encode_rows,
    read_located,
    read_rows,
)
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.prompt import ChatFormat, Example

Row = list[dict[str, str]]


def row(*texts: str) -> Row:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def located(*rows: Row) -> list[Located]:
    return [(f"data/train.jsonl:{number}", row) for number, row in enumerate(rows, start=1)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(["Who is it?", "It is me."] * 3, folder, vocab_size=420, model_max_length=64)
    return ChatFormat.from_folder(folder)


@pytest.mark.parametrize(
    ("question", "casual"),
    [
        ("Who founded Microsoft?", "who founded microsoft"),
        ("Tell me more.", "tell me more"),
        ("Really?!", "really?!"),
        ("Why? ", "why"),
    ],
)
def test_casual_copy_of_a_question(question: str, casual: str) -> None:
    assert casual_copy(row(question, "Answer.")) == row(casual, "Answer.")


@pytest.mark.parametrize("question", ["already casual", "?", "..."])
def test_no_casual_copy_where_nothing_changes(question: str) -> None:
    assert casual_copy(row(question, "Answer.")) is None


def test_casual_copy_touches_the_last_question_only() -> None:
    original = row("Who?", "Me.", "Where?", "Here.")
    assert casual_copy(original) == row("Who?", "Me.", "where", "Here.")
    assert original == row("Who?", "Me.", "Where?", "Here.")


def test_copies_come_once_and_say_what_they_are_copies_of() -> None:
    rows = located(row("Who?", "Me."), row("who", "Me."), row("WHO?", "Me."))
    assert with_casual_copies(rows) == rows
    twice = [rows[0], rows[0]]
    copy = ("data/train.jsonl:1 (casual copy)", row("who", "Me."))
    assert with_casual_copies(twice) == [*twice, copy]


def test_read_rows_keeps_order_and_skips_empty_lines(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(json.dumps({"prompt_id": "1", "messages": row("é?", "1")}) + "\n\n", "utf-8")
    second.write_text(json.dumps({"messages": row("b", "2")}), "utf-8")
    assert read_rows([first, second]) == [row("é?", "1"), row("b", "2")]


def test_located_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    lines = [json.dumps({"messages": row("a", "1")}), "", json.dumps({"messages": row("b", "2")})]
    path.write_text("\n".join(lines), "utf-8")
    assert list(read_located(path, tmp_path)) == [
        ("data/train.jsonl:1", row("a", "1")),
        ("data/train.jsonl:3", row("b", "2")),
    ]


def test_encoded_rows_are_the_chat_format_s(chat: ChatFormat) -> None:
    rows = located(row("Who is it?", "It is me."), row("a", "b", "c", "d"))
    encoded = encode_rows(chat, rows)
    assert [(r.place, r.messages) for r in encoded] == rows
    assert [r.example for r in encoded] == [chat.encode_example(messages) for _, messages in rows]


def test_fitting_rows_are_trained_on_unchanged(chat: ChatFormat) -> None:
    rows = encode_rows(chat, located(row("Who is it?", "It is me."), row("a", "b", "c", "d")))
    kept, report = audited(chat, rows, 64)
    assert kept == rows
    assert report.findings == []


def test_answers_that_would_be_cut_are_named(chat: ChatFormat) -> None:
    rows = located(
        row("Who is it?", "It is me."), row("Long one?", "word " * 50), row("x", "y" * 99)
    )
    with pytest.raises(StageError) as caught:
        audited(chat, encode_rows(chat, rows), 40)
    message = str(caught.value)
    assert "cut-answer (2 of 3 rows)" in message
    assert "data/train.jsonl:2 ('Long one?')" in message
    assert "data/train.jsonl:3 ('x')" in message
    assert "data/train.jsonl:1" not in message
    assert "data.max_length" in message
    assert "--allow cut-answer" in message


def test_no_way_around_is_offered_where_nothing_can_be_allowed(chat: ChatFormat) -> None:
    rows = encode_rows(chat, located(row("Long one?", "word " * 50)))
    with pytest.raises(StageError, match="cut-answer") as caught:
        audited(chat, rows, 40, allow=None)
    assert "--allow" not in str(caught.value)


def test_many_faulty_rows_are_counted_and_ten_named(chat: ChatFormat) -> None:
    rows = encode_rows(chat, located(*[row("q", "word " * 50)] * 14))
    with pytest.raises(StageError) as caught:
        audited(chat, rows, 40)
    message = str(caught.value)
    assert message.count("data/train.jsonl:") == 10
    assert "and 4 more" in message


def test_nothing_to_train_on(chat: ChatFormat) -> None:
    with pytest.raises(StageError, match="contain no conversation"):
        encode_rows(chat, [])


def test_row_that_cannot_be_encoded_is_named(chat: ChatFormat) -> None:
    rows = located(row("a", "b"), [*row("a"), *row("b")])
    with pytest.raises(StageError, match=r"data/train\.jsonl:2: .*must alternate"):
        encode_rows(chat, rows)


@pytest.mark.parametrize(
    ("learnt", "refused"),
    [
        (0, r"nothing-trained \(1 of 1 rows\): not one token would be learnt"),
        (1, r"everything-trained \(1 of 1 rows\): the questions would be learnt"),
    ],
)
def test_masks_of_a_broken_template_are_refused(
    chat: ChatFormat, learnt: int, refused: str
) -> None:
    (right,) = encode_rows(chat, located(row("a", "b")))
    ids = right.example.input_ids
    wrong = replace(right, example=Example(ids, [learnt] * len(ids)))
    with pytest.raises(StageError, match=refused):
        audited(chat, [wrong], 64)
