"""The shortcut for rows in the plainest form reads them as the general rules do."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from phi3_training.data.formats import carried, read_row
from phi3_training.data.jsonl import (
    CheckedRow,
    Line,
    Range,
    StrictJson,
    check_line,
    lines_of,
)
from phi3_training.data.scan import digest_range

from .test_data_faults import BAD_LINES

MESSAGES = [{"role": "user", "content": "Hi: you?"}, {"role": "assistant", "content": "Yes: me."}]
LINE = json.dumps({"messages": MESSAGES, "prompt": "Hi: you?", "prompt_id": "a:1"}).encode()

# Each is one thing that a reader, or the shortcut, could get wrong.
TRAPS: dict[str, bytes] = {
    "key twice": b'{"prompt": "a", ' + LINE[1:],
    "key twice, written otherwise": b'{"pro\\u006dpt": "a", ' + LINE[1:],
    "key twice inside": LINE.replace(b'"role": "user"', b'"role": "user", "role": "user"'),
    "key twice, a colon hidden": b'{"prompt": "a", ' + LINE[1:].replace(b"Hi:", b"Hi\\u003a"),
    "key twice, a colon hidden in capitals": (
        b'{"prompt": "a", ' + LINE[1:].replace(b"Hi:", b"Hi\\u003A")
    ),
    "unknown key twice": b'{"x": 1, "x": 2, ' + LINE[1:],
    "unknown key twice, deep": b'{"x": [{"y": 1, "y": 2}], ' + LINE[1:],
    "number of 5000 digits": b'{"x": ' + b"9" * 5000 + b", " + LINE[1:],
    "number of 5000 digits, a fraction": b'{"x": 0.' + b"9" * 5000 + b", " + LINE[1:],
    "number beyond 64 bits": b'{"x": 123456789012345678901234567890, ' + LINE[1:],
    "id beyond 64 bits": LINE.replace(b'"a:1"', b"123456789012345678901234567890"),
    "id a fraction": LINE.replace(b'"a:1"', b"1.5"),
    "id null": LINE.replace(b'"a:1"', b"null"),
    "deep": b'{"x": ' + b"[" * 300 + b"]" * 300 + b", " + LINE[1:],
    "very deep": b'{"x": ' + b"[" * 1010 + b"]" * 1010 + b", " + LINE[1:],
    "NaN": b'{"x": NaN, ' + LINE[1:],
    "huge exponent": b'{"x": 1e999, ' + LINE[1:],
    "bell": LINE.replace(b"you", b"\\u0007"),
    "backspace": LINE.replace(b"you", b"\\b"),
    "form feed": LINE.replace(b"you", b"\\f"),
    "delete, raw": LINE.replace(b"you", b"\x7f"),
    "delete in an unknown key": b'{"x": "\x7f", ' + LINE[1:],
    "delete, escaped": LINE.replace(b"you", b"\\u007f"),
    "C1, raw": LINE.replace(b"you", "\x86".encode()),
    "NEL, raw": LINE.replace(b"you", "\x85".encode()),
    "C1, escaped": LINE.replace(b"you", b"\\u0086"),
    "C1 in the id": LINE.replace(b"a:1", "\x90".encode()),
    "lone surrogate": LINE.replace(b"you", b"\\ud83d"),
    "surrogate pair": LINE.replace(b"you", b"\\ud83d\\ude00"),
    "escaped slash": LINE.replace(b"you", b"a\\/b"),
    "escaped backslash": LINE.replace(b"you", b"\\\\beta \\\\u0007"),
    "keys turned": json.dumps({"messages": [dict(reversed(m.items())) for m in MESSAGES]}).encode(),
    "spaces around": b"  " + LINE + b" \t",
    "more keys": b'{"score": {"a": [1, 2.5, null]}, ' + LINE[1:],
    "more keys in a message": LINE.replace(b'"role": "user"', b'"role": "user", "name": "x"'),
    "role twice and content": LINE.replace(b'"content": "Hi', b'"role": "user", "content": "Hi'),
}


def line_of(data: bytes) -> Line:
    (line,) = lines_of(io.BytesIO(data + b"\n"), Range(0, len(data) + 1))
    return line


def by_the_rules(data: bytes) -> tuple[list[str], dict[str, Any]] | None:
    """What the general rules make of a line: texts and what is carried, or None."""
    row, problems = StrictJson().read_line(line_of(data))
    if problems or not isinstance(row, dict):
        return None
    read = read_row(row)
    extra, wrong = carried(row)
    if read.problems or wrong or read.form is None:
        return None
    return [message.content for message in read.messages], extra


def checked(data: bytes) -> CheckedRow | None:
    row = check_line(line_of(data), StrictJson())
    return row if isinstance(row, CheckedRow) else None


def agree(data: bytes) -> bool:
    """Whether a line was accepted; fails where the general rules would have read otherwise."""
    row, expected = checked(data), by_the_rules(data)
    assert (row is None) == (expected is None), data[:200]
    if row is None or expected is None:
        return False
    assert row.texts == expected[0]
    written = json.loads(row.written or data)
    assert {key: written[key] for key in written if key != "messages"} == expected[1]
    assert [message["content"] for message in written["messages"]] == expected[0]
    return True


def test_plain_rows_are_accepted_as_they_are() -> None:
    row = checked(LINE)

    assert row is not None
    assert row.written is None
    assert by_the_rules(LINE) == (row.texts, {"prompt": "Hi: you?", "prompt_id": "a:1"})


@pytest.mark.parametrize("name", TRAPS)
def test_trap_is_read_as_the_rules_say(name: str) -> None:
    agree(TRAPS[name])


@pytest.mark.parametrize("name", [n for n in TRAPS if "twice" in n or n.endswith("digits")])
def test_hidden_fault_is_found(name: str) -> None:
    assert checked(TRAPS[name]) is None


@pytest.mark.parametrize("name", ["more keys", "keys turned", "surrogate pair", "escaped slash"])
def test_harmless_rows_are_accepted(name: str) -> None:
    assert agree(TRAPS[name])


@pytest.mark.parametrize("name", BAD_LINES)
def test_no_bad_line_is_accepted(name: str) -> None:
    assert checked(BAD_LINES[name][0]) is None


def test_control_character_at_the_very_end_of_a_file(tmp_path: Path) -> None:
    """There is nothing behind it that could be looked at together with it."""
    path = tmp_path / "a.jsonl"
    start = json.dumps({"messages": MESSAGES}).encode()[:-1] + b', "prompt": "'
    for end in (b"\\b", b"\\f", b"\\u0007", b"\x7f", "\x86".encode()):
        path.write_bytes(start + end + b'"}')
        digest = digest_range(path, Range(0, path.stat().st_size), tmp_path / "rows")

        assert [problem.kind for _, problem, _ in digest.faults] == ["control-character"], end


def test_thousands_of_damaged_lines_are_read_alike() -> None:
    """Lines cut, joined and changed at random; some are still sound, most are not."""
    chance = random.Random(5)  # noqa: S311 - test data
    seeds = [LINE, *TRAPS.values(), *(bad for bad, _, _ in BAD_LINES.values())]
    seeds = [seed for seed in seeds if len(seed) < 3000]
    pieces = [b'"', b":", b"{", b"}", b",", b"\\", b"\\u003a", b'"role":', b" ", b"\xc2\x85", b"1"]
    accepted = 0
    for _ in range(6000):
        line = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(0, 2)):
            place = chance.randrange(len(line) + 1)
            match chance.randrange(4):
                case 0:
                    line[place:place] = chance.choice(pieces)
                case 1:
                    del line[place : place + chance.randint(1, 3)]
                case 2:
                    other = chance.choice(seeds)
                    start = chance.randrange(len(other))
                    line[place:place] = other[start : start + chance.randint(1, 40)]
                case _:
                    line[place : place + 1] = bytes([chance.randrange(256)])
        if b"\n" not in line:
            accepted += agree(bytes(line))
    assert accepted > 200


def test_a_range_of_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    lines = [*TRAPS.values(), *(bad for bad, _, _ in BAD_LINES.values())]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))

    digest = digest_range(path, Range(0, path.stat().st_size), tmp_path / "rows")

    sound = [number for number, line in enumerate(lines, start=1) if by_the_rules(line) is not None]
    assert digest.line.tolist() == sound
    assert len(sound) > 10
