"""Rows to train on: casual copies and the refusals before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training.errors import StageError
from phi3_training.finetune.rows import casual_copy, encode_rows, read_rows, with_casual_copies
from phi3_training.finetune.tokenizer import make_tokenizer
from phi3_training.prompt import ChatFormat, Example

Row = list[dict[str, str]]


def row(*texts: str) -> Row:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


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


def test_copies_come_once() -> None:
    rows = [row("Who?", "Me."), row("who", "Me."), row("WHO?", "Me.")]
    assert with_casual_copies(rows) == rows
    assert with_casual_copies(rows[:1] * 2) == [rows[0], rows[0], row("who", "Me.")]


def test_read_rows_keeps_order_and_skips_empty_lines(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(json.dumps({"prompt_id": "1", "messages": row("é?", "1")}) + "\n\n", "utf-8")
    second.write_text(json.dumps({"messages": row("b", "2")}), "utf-8")
    assert read_rows([first, second]) == [row("é?", "1"), row("b", "2")]


def test_encoded_rows_are_the_chat_format_s(chat: ChatFormat) -> None:
    rows = [row("Who is it?", "It is me."), row("a", "b", "c", "d")]
    assert encode_rows(chat, rows, 64, "x") == [chat.encode_example(r) for r in rows]


def test_answers_that_would_be_cut_are_named(chat: ChatFormat) -> None:
    rows = [row("Who is it?", "It is me."), row("Long one?", "word " * 50), row("x", "y " * 60)]
    with pytest.raises(StageError) as caught:
        encode_rows(chat, rows, 40, "data.train")
    message = str(caught.value)
    assert "2 of 3 conversations are longer than 40 tokens" in message
    assert "conversation 2 ('Long one?'…), conversation 3" in message
    assert "data.max_length" in message


def test_many_faulty_rows_are_counted_and_five_named(chat: ChatFormat) -> None:
    with pytest.raises(StageError, match="and 4 more"):
        encode_rows(chat, [row("q", "word " * 50)] * 9, 40, "data.train")


def test_nothing_to_train_on(chat: ChatFormat) -> None:
    with pytest.raises(StageError, match=r"data\.replay holds no conversation"):
        encode_rows(chat, [], 40, "data.replay")


def test_row_that_cannot_be_encoded_is_named(chat: ChatFormat) -> None:
    with pytest.raises(StageError, match=r"data\.train, conversation 2: .*take turns"):
        encode_rows(chat, [row("a", "b"), [*row("a"), *row("b")]], 40, "data.train")


class Masked(ChatFormat):
    """A chat format whose mask is always the same: what a broken template leads to."""

    learnt = 0

    def __init__(self, learnt: int) -> None:
        self.learnt = learnt

    def encode_example(self, messages: object) -> Example:
        return Example([1, 2, 3], [self.learnt] * 3)


def test_row_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(StageError, match="1 of 1 conversations have no token to learn"):
        encode_rows(Masked(0), [row("a", "b")], 40, "data.train")


def test_rows_learnt_from_end_to_end_are_refused() -> None:
    with pytest.raises(StageError, match="questions too"):
        encode_rows(Masked(1), [row("a", "b")], 40, "data.train")
