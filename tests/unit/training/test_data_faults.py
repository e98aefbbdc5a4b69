"""Every fault of a chat file is reported with file and line, and none stops the reading."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from phi3_training.data import Fault, check, read_conversations, show
from phi3_training.data.jsonl import LINE_LIMIT
from phi3_training.errors import DataError

USER = {"role": "user", "content": "Hi?"}
BOT = {"role": "assistant", "content": "Hello."}


def row(*messages: Any) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


def sound(number: int) -> bytes:
    return row({"role": "user", "content": f"Question {number}?"}, BOT)


def faults_of(path: Path, content: bytes) -> list[Fault]:
    path.write_bytes(content)
    return check([path]).faults


def between(bad: bytes) -> bytes:
    """The bad line as line 2 of three."""
    return b"\n".join([sound(1), bad, sound(2)]) + b"\n"


BAD_LINES: dict[str, tuple[bytes, str, str]] = {
    "cut short": (b'{"messages": [', "broken-json", "at the end of the line"),
    "single quotes": (b"{'messages': []}", "broken-json", "double quotes"),
    "trailing comma": (b'{"messages": [],}', "broken-json", "broken JSON near"),
    "two objects": (sound(8) + sound(9), "broken-json", "Extra data"),
    "deep brackets": (b"[" * 100_000, "broken-json", "nested too deeply"),
    "endless number": (b'{"id": ' + b"9" * 5000 + b"}", "broken-json", "thousands of digits"),
    "array": (b"[1, 2]", "not-an-object", "the line is an array"),
    "text": (b'"hello"', "not-an-object", "the line is a text"),
    "number": (b"17", "not-an-object", "the line is a number"),
    "null": (b"null", "not-an-object", "the line is null"),
    "no messages": (b'{"title": "Hi"}', "unknown-format", "it has no 'messages'"),
    "no keys": (b"{}", "unknown-format", "it has no keys"),
    "message alone": (json.dumps(USER).encode(), "unknown-format", "single message"),
    "half a pair": (b'{"prompt": "Hi?"}', "unknown-format", "needs an answer in addition"),
    "answer only": (b'{"output": "Hello."}', "unknown-format", "needs a question in addition"),
    "two formats": (
        b'{"prompt": "a", "completion": "b", "input": "c", "output": "d"}',
        "two-formats",
        "'prompt' and 'input', 'completion' and 'output' differ",
    ),
    "messages null": (b'{"messages": null}', "wrong-type", "messages is null"),
    "messages text": (b'{"messages": "Hi"}', "wrong-type", "messages is text"),
    "messages empty": (b'{"messages": []}', "no-messages", "empty list"),
    "message text": (row("Hi", BOT), "wrong-type", "messages[0] is text"),
    "no role": (row({"content": "Hi"}, BOT), "missing-role", "messages[0] has no 'role'"),
    "no content": (row(USER, {"role": "assistant"}), "missing-content", "messages[1] has no"),
    "role number": (row({"role": 1, "content": "a"}, BOT), "wrong-type", "role is a number"),
    "content null": (
        row(USER, {"role": "assistant", "content": None}),
        "wrong-type",
        "messages[1].content is null",
    ),
    "content parts": (
        row({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, BOT),
        "not-text",
        "messages[0].content has a part of the kind 'image_url'",
    ),
    "content true": (row({"role": "user", "content": True}, BOT), "wrong-type", "true/false"),
    "unknown role": (row({"role": "judge", "content": "x"}, BOT), "unknown-role", "'judge'"),
    "role in capitals": (
        row({"role": "User", "content": "x"}, BOT),
        "unknown-role",
        "write 'user'",
    ),
    "empty content": (row({"role": "user", "content": ""}, BOT), "empty-content", "is empty"),
    "blank content": (row({"role": "user", "content": " \n"}, BOT), "empty-content", "is blank"),
    "empty system": (
        row({"role": "system", "content": ""}, USER, BOT),
        "empty-content",
        "remove the system message",
    ),
    "two users": (row(USER, USER, BOT), "role-order", "messages 1 and 2 are both user"),
    "two assistants": (row(USER, BOT, BOT), "role-order", "messages 2 and 3 are both assistant"),
    "assistant first": (row(BOT, USER, BOT), "role-order", "starts with an assistant"),
    "assistant after system": (
        row({"role": "system", "content": "Be kind."}, BOT),
        "role-order",
        "starts with an assistant",
    ),
    "system alone": (
        row({"role": "system", "content": "x"}),
        "role-order",
        "only a system message",
    ),
    "system late": (row(USER, {"role": "system", "content": "x"}, BOT), "role-order", "message 2"),
    "two systems": (
        row({"role": "system", "content": "x"}, {"role": "system", "content": "y"}, USER, BOT),
        "role-order",
        "message 2 is a system message",
    ),
    "no answer": (row(USER, BOT, USER), "role-order", "ends with a user message"),
    "repeated key": (
        b'{"messages": [], ' + row(USER, BOT)[1:],
        "repeated-key",
        "the key 'messages' occurs twice",
    ),
    "repeated inner key": (
        b'{"messages": [{"role": "user", "role": "user", "content": "Hi"}, '
        b'{"role": "assistant", "content": "Hello."}]}',
        "repeated-key",
        "the key 'role'",
    ),
    "NaN": (b'{"x": NaN, ' + row(USER, BOT)[1:], "not-a-number", "NaN is not a JSON value"),
    "Infinity": (b'{"x": -Infinity, ' + row(USER, BOT)[1:], "not-a-number", "-Infinity"),
    "NUL byte": (b'{"messages": "\x00"}', "control-character", "NUL byte at byte 15"),
    "raw escape byte": (b'{"a": "\x1b"}', "control-character", "0x1b at byte 8"),
    "escaped control": (
        row({"role": "user", "content": "a\x07b"}, BOT),
        "control-character",
        "U+0007 at character 2",
    ),
    "half a surrogate": (
        row({"role": "user", "content": "ab\ud83d"}, BOT),
        "control-character",
        "half of a surrogate pair U+D83D at character 3",
    ),
    "latin-1": ('{"a": "café"}'.encode("latin-1"), "not-utf8", "byte 0xe9 at byte 11 of the line"),
    "prompt_id a list": (
        b'{"prompt_id": [1], ' + row(USER, BOT)[1:],
        "wrong-type",
        "prompt_id is an array",
    ),
    "from unknown": (
        b'{"conversations": [{"from": "judge", "value": "x"}, {"from": "gpt", "value": "y"}]}',
        "unknown-role",
        "known roles: human, gpt",
    ),
    "no value": (
        b'{"conversations": [{"from": "human"}, {"from": "gpt", "value": "y"}]}',
        "missing-content",
        "conversations[0] has no 'value'",
    ),
    "alpaca history": (
        b'{"instruction": "a", "output": "b", "history": [["c"]]}',
        "wrong-type",
        "history[0]",
    ),
    "completion empty": (b'{"prompt": "a", "completion": ""}', "empty-content", "completion is"),
    "instruction number": (b'{"instruction": 3, "output": "b"}', "wrong-type", "instruction is a"),
}


def test_more_than_forty_kinds_of_bad_rows_are_distinguished(tmp_path: Path) -> None:
    told = {
        (kind, re.sub(r"[0-9]+", "N", faults_of(tmp_path / "a.jsonl", between(bad))[0].what))
        for bad, kind, _ in BAD_LINES.values()
    }

    assert len(told) >= 40


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_reported_with_its_number(tmp_path: Path, name: str) -> None:
    bad, kind, words = BAD_LINES[name]

    faults = faults_of(tmp_path / "a.jsonl", between(bad))

    assert [(fault.path.name, fault.line, fault.kind) for fault in faults] == [("a.jsonl", 2, kind)]
    assert words in str(faults[0])
    assert faults[0].fix


@pytest.mark.parametrize("name", BAD_LINES)
def test_valid_rows_around_a_bad_line_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(between(BAD_LINES[name][0]))

    assert [conversation.line for conversation in show(path, 9)] == [1, 3]


def test_broken_json_names_the_column(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path / "a.jsonl", b'{"messages": oops}\n')

    assert fault.column == 14
    assert str(fault).startswith(f"{tmp_path}/a.jsonl:1:14: broken JSON near ")


def test_byte_offset_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path / "a.jsonl", sound(1) + b"\n" + b'{"a": "\xff"}\n')

    assert f"(byte {len(sound(1)) + 1 + 8} of the file)" in fault.what


def notes_of(path: Path, content: bytes) -> list[str]:
    """What is noted of a file, which has no fault."""
    assert faults_of(path, content) == []
    return list(check([path]).files[0].notes)


def test_byte_order_mark_is_skipped_and_noted(tmp_path: Path) -> None:
    (note,) = notes_of(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + sound(1) + b"\n" + sound(2))

    assert "byte-order mark" in note
    assert len(show(tmp_path / "a.jsonl", 9)) == 2


def test_crlf_is_noted_once_with_a_count(tmp_path: Path) -> None:
    lines = sound(1) + b"\n" + sound(2) + b"\r\n" + sound(3) + b"\r\n" + sound(4) + b"\n"
    (note,) = notes_of(tmp_path / "a.jsonl", lines)

    assert note.startswith("2 lines with Windows line ends")
    assert len(show(tmp_path / "a.jsonl", 9)) == 4


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
@pytest.mark.parametrize("escaped", [True, False])
def test_other_line_ends_inside_of_texts_stay(tmp_path: Path, mark: str, escaped: bool) -> None:
    path = tmp_path / "a.jsonl"
    row = {"messages": [{"role": "user", "content": f"One{mark}two?"}, BOT]}
    notes = notes_of(path, json.dumps(row, ensure_ascii=escaped).encode() + b"\n" + sound(2))

    assert len(notes) == (0 if escaped else 1)
    assert [(c.line, c.messages[0].content) for c in show(path, 9)] == [
        (1, f"One{mark}two?"),
        (2, "Question 2?"),
    ]


def test_line_of_five_megabytes_is_named_and_not_quoted(tmp_path: Path) -> None:
    big = row({"role": "user", "content": "x" * 5_000_000}, BOT)
    (fault,) = faults_of(tmp_path / "a.jsonl", between(big))

    assert (fault.line, fault.kind) == (2, "line-too-long")
    assert "5.0 MB; the limit is 1 MiB" in fault.what
    assert len(str(fault)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(("surplus", "kinds"), [(0, []), (1, ["line-too-long"])])
@pytest.mark.parametrize("ending", [b"\n", b""])
def test_line_limit_is_exact(tmp_path: Path, surplus: int, kinds: list[str], ending: bytes) -> None:
    filling = LINE_LIMIT - len(row({"role": "user", "content": ""}, BOT)) + surplus
    line = row({"role": "user", "content": "x" * filling}, BOT)
    assert len(line) == LINE_LIMIT + surplus

    faults = faults_of(tmp_path / "a.jsonl", sound(1) + b"\n" + line + ending)

    assert [fault.kind for fault in faults] == kinds


def test_duplicate_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (fault,) = faults_of(path, b"\n".join([sound(1), sound(2), sound(1)]))

    assert (fault.line, fault.kind) == (3, "duplicate")
    assert fault.what == f"the same conversation as {path}:1"


def test_duplicate_in_another_file_is_found(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(sound(1))
    second.write_bytes(sound(2) + b"\n" + sound(1))

    (fault,) = check([first, second]).faults

    assert (fault.path, fault.line) == (second, 2)
    assert f"{first}:1" in fault.what


def test_other_answer_to_the_same_question_is_no_duplicate(tmp_path: Path) -> None:
    other = row({"role": "user", "content": "Question 1?"}, {"role": "assistant", "content": "No."})

    assert faults_of(tmp_path / "a.jsonl", sound(1) + b"\n" + other) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "the file is empty"), (b"\n  \n", "the file contains no conversation")],
)
def test_file_without_rows(tmp_path: Path, content: bytes, what: str) -> None:
    (fault,) = faults_of(tmp_path / "a.jsonl", content)

    assert (fault.line, fault.kind, fault.what) == (0, "no-rows", what)


def test_missing_file_and_empty_folder_are_faults(tmp_path: Path) -> None:
    faults = check([tmp_path / "none.jsonl", tmp_path]).faults

    assert [(fault.path, fault.line, fault.kind) for fault in faults] == [
        (tmp_path, 0, "no-chat-files"),
        (tmp_path / "none.jsonl", 0, "no-such-file"),
    ]
    assert str(faults[1]).startswith(f"{tmp_path}/none.jsonl: no such file;")


def test_blank_lines_at_the_end_are_fine(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "a.jsonl", sound(1) + b"\n\n  \n\n") == []


def test_blank_lines_between_rows_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert faults_of(path, b"\n" + sound(1) + b"\n\n \n\r\n" + sound(2) + b"\n\n") == []
    assert [c.line for c in show(path, 9)] == [2, 6]


def test_every_fault_of_one_row_is_reported(tmp_path: Path) -> None:
    bad = row({"role": "boss", "content": ""}, {"content": 5}, "x")

    faults = faults_of(tmp_path / "a.jsonl", between(bad))

    kinds = ["unknown-role", "empty-content", "missing-role", "wrong-type", "wrong-type"]
    assert [(fault.line, fault.kind) for fault in faults] == [(2, kind) for kind in kinds]


def test_all_faults_of_one_file_at_once(tmp_path: Path) -> None:
    """What a person sees who brings a file with everything wrong."""
    lines = [
        b"\xef\xbb\xbf" + sound(1),
        b'{"messages": [',
        row({"content": "Hi"}, BOT),
        row({"role": "user", "content": 5}, BOT),
        row({"role": "user", "content": ""}, BOT) + b"\r",
        row(USER, BOT, BOT),
        row({"role": "user", "content": "x" * 5_000_000}, BOT),
        sound(1),
        '{"a": "é"}'.encode("latin-1"),
        sound(2) + b"\r",
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")

    with pytest.raises(DataError) as caught:
        read_conversations([path, tmp_path / "none.jsonl"])

    faults = [fault for fault in caught.value.faults if isinstance(fault, Fault)]
    assert [(fault.path.name, fault.line, fault.kind) for fault in faults] == [
        ("a.jsonl", 2, "broken-json"),
        ("a.jsonl", 3, "missing-role"),
        ("a.jsonl", 4, "wrong-type"),
        ("a.jsonl", 5, "empty-content"),
        ("a.jsonl", 6, "role-order"),
        ("a.jsonl", 7, "line-too-long"),
        ("a.jsonl", 8, "duplicate"),
        ("a.jsonl", 9, "not-utf8"),
        ("none.jsonl", 0, "no-such-file"),
    ]
    assert "The chats have 9 faults; nothing was written" in str(caught.value)
    assert f"{path}:7: the line has 5.0 MB" in str(caught.value)


def test_paths_below_the_current_folder_are_shown_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (fault,) = faults_of(tmp_path / "a.jsonl", b"17\n")

    assert fault.place == "a.jsonl:1"


def test_faults_of_one_kind_are_one_line_and_all_are_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"17\n" * 50 + sound(1) + b'\n{"a": 1}' * 2)

    report = check([path])

    lines = report.lines()
    assert lines[0].endswith("1 conversation (messages; 0 with several turns), 52 faults")
    kind = '50 rows: the line is a number, not an object; write {"messages": […]}'
    assert lines[2] == f"  {kind}; first at {path}:1, 2, 3, 4, 5 …"
    assert [line.split(": ")[0] for line in lines[3:5]] == [f"  {path}:52", f"  {path}:53"]
    assert lines[5] == "  (every row: --report FILE, or -o json)"
    assert len(report.every_line().splitlines()) == 52
    assert len(report.as_dict()["faults"]) == 52
    assert report.as_dict()["faults"][49]["line"] == 50


def test_rows_of_one_kind_whose_texts_differ_are_folded_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(sound(n) + b"\n" for n in (1, 1, 2, 2, 3, 3)))

    with pytest.raises(DataError) as caught:
        read_conversations([path])

    assert len(caught.value.faults) == 3
    folded = f"  3 rows such as: the same conversation as {path}:1; keep one of the two"
    assert folded in str(caught.value)
    assert f"; at {path}:2, 4, 6\n" in str(caught.value)


def test_check_report_shows_twenty_lines(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:02}.jsonl" for number in range(25)]
    for number, path in enumerate(paths):
        path.write_bytes(b"17\n" + sound(number))

    lines = check(paths).lines()

    assert len([line for line in lines if "the line is a number" in line]) == 20
    assert lines[-2:] == ["  … and 5 more lines", "  (every row: --report FILE, or -o json)"]


def test_show_of_a_file_without_a_valid_row_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"17\n")

    with pytest.raises(DataError, match="the line is a number"):
        show(path, 3)
