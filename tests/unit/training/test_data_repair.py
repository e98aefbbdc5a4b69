"""`phi3 data fix` and `convert`: right rows come out, and every change is listed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from phi3_training import cli
from phi3_training.data import check
from phi3_training.data.repair import convert, fix
from phi3_training.errors import DataError, UsageError


def turns(text: str) -> list[dict[str, str]]:
    """`u:Hi a:Yo` as messages; a letter is a role, `_` an empty text."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    pairs = (word.split(":") for word in text.split())
    return [{"role": roles[role], "content": "" if said == "_" else said} for role, said in pairs]


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("given", "expected", "kinds"),
    [
        ("a:Welcome u:Q a:A", "u:Q a:A", ["greeting"]),
        ("s:S a:Welcome u:Q a:A", "s:S u:Q a:A", ["greeting"]),
        ("a:One a:Two u:Q a:A", "u:Q a:A", ["joined", "greeting"]),
        ("u:Q u:R a:A", "u:Q\n\nR a:A", ["joined"]),
        ("u:Q a:A a:B", "u:Q a:A\n\nB", ["joined"]),
        ("u:Q a:A u:Bye", "u:Q a:A", ["open-end"]),
        ("u:Q a:A u:One u:Two", "u:Q a:A", ["joined", "open-end"]),
        ("u:Q a:_ u:R a:A", "u:Q\n\nR a:A", ["empty-turn", "joined"]),
        ("s:_ u:Q a:A", "u:Q a:A", ["empty-turn"]),
        ("u:Q a:A u:R a:_", "u:Q a:A", ["empty-turn", "open-end"]),
        ("u:Q a:A", "u:Q a:A", []),
    ],
)
def test_turns_are_repaired_and_each_change_is_listed(
    tmp_path: Path, given: str, expected: str, kinds: list[str]
) -> None:
    source = write(tmp_path / "a.jsonl", {"prompt": "x", "completion": "y"},
                   {"messages": turns(given)})  # fmt: skip
    out = tmp_path / "b.jsonl"

    report = fix([source], out)

    expected_turns = [
        {"role": {"s": "system", "u": "user", "a": "assistant"}[part[0]], "content": part[2:]}
        for part in expected.split(" ")
    ]
    assert read(out)[1] == {"messages": expected_turns}
    assert [change.kind for change in report.changes] == kinds
    assert {change.line for change in report.changes} <= {2}
    assert (report.read, report.written) == (2, 2)
    assert check([out]).faults == []


@pytest.mark.parametrize(
    ("key", "role", "text", "wrap"),
    [
        ("conversations", "role", "value", str),
        ("messages", "from", "content", str),
        ("contents", "role", "parts", lambda text: [{"text": text}]),
    ],
)
def test_turns_are_repaired_under_whichever_keys(
    tmp_path: Path, key: str, role: str, text: str, wrap: Any
) -> None:
    """Under other keys than expected every turn looked empty, and was dropped."""
    said = [("model", "Welcome"), ("user", "Q"), ("user", "R"), ("model", "A")]
    row = {key: [{role: who, text: wrap(what)} for who, what in said]}
    out = tmp_path / "b.jsonl"
    report = fix([write(tmp_path / "a.jsonl", row)], out)
    assert [change.kind for change in report.changes] == ["joined", "greeting"]
    asked, answered = read(out)[0]["messages"]
    assert asked["content"].split() == ["Q", "R"]
    assert answered == {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": turns("u:Q t:42 a:A")}, "turn 2 is of the role 'tool'"),
        (
            {"messages": [*turns("u:Q"), {"role": "assistant", "content": "A", "tool_calls": [1]}]},
            "turn 2 has 'tool_calls'",
        ),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "'observation'"),
        ({}, "it is empty"),
        ({"messages": []}, "it is empty"),
        ({"messages": turns("u:Q u:R")}, "ends with a user message"),
        ({"messages": turns("u:Q a:A s:Late u:R a:B")}, "message 3 is a system message"),
        ({"prompt": "Q", "completion": " "}, "completion is blank"),
        ({"messages": turns("u:x a:y")}, "the same conversation as"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' occurs twice"),
        ("{broken", "broken JSON"),
        ("17", "not an object"),
        ({"question of": "another kind"}, "unknown format"),
    ],
)
def test_rows_that_cannot_be_repaired_are_left_out_with_the_reason(
    tmp_path: Path, row: Any, why: str
) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": turns("u:x a:y")}, row)

    report = fix([source], tmp_path / "b.jsonl")

    assert read(tmp_path / "b.jsonl") == [{"messages": turns("u:x a:y")}]
    (change,) = report.changes
    assert (change.path, change.line, change.kind) == (source, 2, "left-out")
    assert why in change.what


def test_sharegpt_with_greetings_is_repaired_and_the_errors_of_check_name_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(number: int) -> dict[str, Any]:
        said = [("gpt", "Hello!"), ("human", f"Q{number}"), ("gpt", f"A{number}"), ("human", "Ok")]
        return {"conversations": [{"from": role, "value": text} for role, text in said]}

    source = write(tmp_path / "a.jsonl", *map(row, range(40)))
    out, listed = tmp_path / "b.jsonl", tmp_path / "changes.txt"

    assert cli.main(["data", "check", str(source)]) == 1
    shown = capsys.readouterr().out
    folded = "40 rows: wrong order of roles: it starts with an assistant message; "
    assert folded in shown
    assert f"first at {source}:1, 2, 3, 4, 5 …" in shown
    assert "phi3 data fix" in shown

    assert cli.main(["data", "fix", str(source), "-o", str(out), "--report", str(listed)]) == 0
    shown = capsys.readouterr().out
    assert f"{out}: 40 of 40 rows written, 40 of them repaired, 0 left out" in shown
    assert len(listed.read_text().splitlines()) == 80
    assert f"greeting: {source}:17: the greeting 'Hello!'" in listed.read_text()
    assert read(out)[7] == {"messages": turns("u:Q7 a:A7")}
    assert cli.main(["data", "check", str(out)]) == 0


def test_json_report_has_every_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": turns("a:Hi u:Q a:A")}, "", "17")
    command = ["data", "fix", str(source), "-o", str(tmp_path / "b.jsonl"), "-o", "json"]

    assert cli.main(command) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"greeting": 1, "left-out": 1}
    places = [(change["file"], change["line"]) for change in report["changes"]]
    assert places == [(str(source), 1), (str(source), 3)]


def test_control_characters_and_spelling_of_roles(tmp_path: Path) -> None:
    messages = [{"role": "User", "content": "Q\x00?"}, {"role": "assistant", "content": "A\ud800"}]
    source = write(tmp_path / "a.jsonl", {"messages": messages})

    report = fix([source], tmp_path / "b.jsonl")

    assert read(tmp_path / "b.jsonl") == [{"messages": turns("u:Q? a:A")}]
    assert [change.kind for change in report.changes] == ["characters", "characters", "role-name"]


def test_turns_that_differ_in_more_than_their_text_are_not_joined(tmp_path: Path) -> None:
    answers = [
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "assistant", "content": "good", "weight": 1},
    ]
    rows = [{"messages": turns("u:x a:y")}, {"messages": [*turns("u:Q"), *answers]}]

    report = fix([write(tmp_path / "a.jsonl", *rows)], tmp_path / "b.jsonl")

    assert [change.kind for change in report.changes] == ["left-out"]
    assert report.written == 1


def test_what_would_destroy_something_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": turns("u:Q a:A")})
    other = write(tmp_path / "b.jsonl", "kept")

    for call in (fix, convert):
        with pytest.raises(UsageError, match="exists already"):
            call([source], other)
        with pytest.raises(UsageError, match="one of the files to read"):
            call([source], source, force=True)
        with pytest.raises(UsageError, match="one of the files to read"):
            call([tmp_path], other, force=True)
        with pytest.raises(UsageError, match=r"ends with \.jsonl"):
            call([source], tmp_path / "c.csv")
    assert other.read_text() == "kept\n"
    assert fix([source], other, force=True).written == 1
    assert read(other) == read(source)


def test_nothing_is_written_where_no_row_is_left(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": []}, "{broken")
    out = tmp_path / "b.jsonl"

    with pytest.raises(DataError, match="broken JSON"):
        fix([source], out)
    with pytest.raises(DataError, match="cannot be read"):
        fix([tmp_path / "none.jsonl"], out)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_convert_writes_messages_of_anything_and_openai_without_other_keys(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("instruction,output\nQ,A\nR,B\n")
    lines = write(tmp_path / "b.jsonl", {"messages": turns("s:S u:x a:y"), "accept": ["y"]})

    report = convert([table, lines], tmp_path / "out.jsonl")

    rows = [{"messages": turns("u:Q a:A")}, {"messages": turns("u:R a:B")}, *read(lines)]
    assert read(tmp_path / "out.jsonl") == rows
    assert report.formats == {"alpaca": 2, "messages": 1}

    report = convert([tmp_path / "out.jsonl"], tmp_path / "openai.jsonl", "openai")
    expected = [{"messages": row["messages"]} for row in rows]
    assert read(tmp_path / "openai.jsonl") == expected
    assert report.dropped == {"accept": 1}
    assert "1 rows had 'accept'" in report.lines()[1]


def test_convert_repairs_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"messages": turns("a:Hi u:Q a:A")})

    with pytest.raises(DataError, match="starts with an assistant message"):
        convert([source], tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"prompt": "a", "completion": "b"}, {broken, {"prompt": "c"}]'),
        ("a.csv", 'prompt,completion\na,b\n"c"x,d\ne,f\n'),
    ],
)
def test_a_file_that_is_not_read_to_its_end_is_not_half_repaired(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(DataError, match=name):
        fix([tmp_path / name], tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


def test_a_row_of_a_table_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,d,e\nf,g\n")

    report = fix([tmp_path / "a.csv"], tmp_path / "b.jsonl")

    assert [row["messages"] for row in read(tmp_path / "b.jsonl")] == [
        turns("u:a a:b"),
        turns("u:f a:g"),
    ]
    assert [(change.line, change.kind) for change in report.changes] == [(3, "left-out")]


def test_files_are_read_as_every_other_command_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": turns("a:Hi u:Q a:A")}, {"messages": turns("u:R a:B")}, {"messages": []}]
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(b"\r\n".join(json.dumps(row).encode() for row in rows))
    )
    (tmp_path / "b.json").write_text(json.dumps({"data": rows[:1] * 2}), encoding="utf-16")
    out = tmp_path / "out.jsonl"

    command = [
        "data",
        "fix",
        str(tmp_path / "a.jsonl.gz"),
        str(tmp_path / "b.json"),
        "-o",
        str(out),
    ]
    assert cli.main(command) == 0

    shown = capsys.readouterr().out
    assert read(out) == [{"messages": turns("u:Q a:A")}, {"messages": turns("u:R a:B")}]
    assert f"note: {tmp_path / 'a.jsonl.gz'}: unpacked with gzip" in shown
    assert f"{tmp_path / 'b.json'}:1 (row 2): the row was left out: it is the same" in shown


def test_keys_that_are_not_written_are_named_once(tmp_path: Path) -> None:
    rows = [{"messages": turns(f"u:Q{n} a:A"), "id": n + 1, "prompt_id": "kept"} for n in range(3)]
    other = {"instruction": "Do", "input": "this", "output": "Done", "topic": "work"}
    source = write(tmp_path / "a.jsonl", *rows, other)

    report = fix([source], tmp_path / "b.jsonl")

    assert report.changes == ()
    assert report.notes == (
        f"note: {source}: 'id' of 3 rows is not used and not written",
        f"note: {source}: 'topic' of 1 row is not used and not written",
    )
