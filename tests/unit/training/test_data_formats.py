"""Each known chat format becomes the same conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_training.data import Conversation, check, read_conversations

SYSTEM, USER, BOT = ("system", "Be kind."), ("user", "Hi?"), ("assistant", "Hello.")
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]
MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
GEMINI = [
    {"role": "user", "parts": [{"text": "Hi?"}]},
    {"role": "model", "parts": [{"text": "Hello."}]},
]

ROWS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("messages", {"messages": MESSAGES}, [USER, BOT]),
    (
        "messages",
        {"messages": [{"role": "system", "content": "Be kind."}, *MESSAGES]},
        [SYSTEM, USER, BOT],
    ),
    ("prompt/completion", {"prompt": "Hi?", "completion": "Hello."}, [USER, BOT]),
    ("input/output", {"input": "Hi?", "output": "Hello."}, [USER, BOT]),
    ("alpaca", {"instruction": "Hi?", "output": "Hello."}, [USER, BOT]),
    ("alpaca", {"instruction": "Hi?", "input": "", "output": "Hello."}, [USER, BOT]),
    (
        "alpaca",
        {"instruction": "Sort.", "input": "b a", "output": "a b", "system": "Be kind."},
        [SYSTEM, ("user", "Sort.\n\nb a"), ("assistant", "a b")],
    ),
    ("sharegpt", {"conversations": SHAREGPT}, [USER, BOT]),
    ("sharegpt", {"conversations": SHAREGPT, "system": "Be kind."}, [SYSTEM, USER, BOT]),
    ("sharegpt", {"conversations": MESSAGES}, [USER, BOT]),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "Be kind."}, *SHAREGPT]},
        [SYSTEM, USER, BOT],
    ),
    ("gemini", {"contents": GEMINI}, [USER, BOT]),
    (
        "gemini",
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be kind."}]},
            "contents": GEMINI,
        },
        [SYSTEM, USER, BOT],
    ),
    ("gemini", {"system_instruction": "Be kind.", "contents": GEMINI}, [SYSTEM, USER, BOT]),
    # Some other text under Gemini's name.
    ("messages", {"messages": MESSAGES, "contents": "a page of a manual"}, [USER, BOT]),
]


def read_one(path: Path, row: dict[str, Any]) -> Conversation:
    path.write_text(json.dumps(row), encoding="utf-8")
    (conversation,) = read_conversations([path])
    return conversation


@pytest.mark.parametrize(("name", "row", "expected"), ROWS)
def test_format_is_detected_and_converted(
    tmp_path: Path, name: str, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    path = tmp_path / "a.jsonl"
    conversation = read_one(path, row)

    assert [(message.role, message.content) for message in conversation.messages] == expected
    assert check([path]).files[0].formats == {name: 1}
    assert (conversation.source, conversation.line) == (path, 1)


def test_prompt_and_prompt_id_are_carried_along(tmp_path: Path) -> None:
    row = {"prompt": "Hi?", "prompt_id": "ab12", "messages": MESSAGES, "score": 3}

    conversation = read_one(tmp_path / "a.jsonl", row)

    assert conversation.extra == {"prompt": "Hi?", "prompt_id": "ab12"}
    assert conversation.to_dict() == {
        "messages": MESSAGES,
        "prompt": "Hi?",
        "prompt_id": "ab12",
    }


def test_prompt_of_a_completion_is_not_carried_twice(tmp_path: Path) -> None:
    row = {"prompt": "Hi?", "completion": "Hello.", "prompt_id": 7}

    assert read_one(tmp_path / "a.jsonl", row).extra == {"prompt_id": 7}


def test_conversation_survives_a_round_trip(tmp_path: Path) -> None:
    conversation = read_one(tmp_path / "a.jsonl", {"messages": MESSAGES, "prompt_id": "x"})

    again = Conversation.from_dict(conversation.to_dict(), conversation.source, conversation.line)

    assert again == conversation


def test_formats_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"Question {i}?", "completion": "Yes."} for i in range(3)]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"messages": MESSAGES}]))

    assert check([path]).files[0].formats == {"prompt/completion": 3, "messages": 1}


def test_line_breaks_tabs_and_any_script_are_sound(tmp_path: Path) -> None:
    answer = "one\n\ttwo\r\n\u2028 日本語 \U0001f600 <|end|>"
    conversation = read_one(tmp_path / "a.jsonl", {"prompt": "¿Qué?", "completion": answer})

    assert conversation.messages[1].content == answer


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"functionCall": {"name": "f"}}, "functionCall"),
        ({"inlineData": {"mimeType": "image/png"}}, "inlineData"),
        ({"text": "Let me think.", "thought": True}, "thought"),
    ],
)
def test_what_gemini_does_not_say_as_text_is_refused_by_its_name(
    tmp_path: Path, part: dict[str, Any], kind: str
) -> None:
    path = tmp_path / "a.jsonl"
    answer = {"role": "model", "parts": [part, {"text": "Hello."}]}
    path.write_text(json.dumps({"contents": [GEMINI[0], answer]}), encoding="utf-8")
    (fault,) = check([path]).faults
    assert f"contents[1].parts has a part of the kind {kind!r}" in fault.what
