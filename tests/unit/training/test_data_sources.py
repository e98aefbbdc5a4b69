"""Chats from JSON arrays, tables, folders and hub sets become what JSON lines become."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from phi3_training.data import check, fingerprints, prepare, read_conversations, show
from phi3_training.data.jsonl import LINE_LIMIT
from phi3_training.errors import DataError, RecipeError
from phi3_training.recipe import DataSection, load_recipe
from phi3_training.recipe.sections import DEFAULT_SET, HubSet
from phi3_training.run import Run

MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello.\nYou?"}]


def pairs(count: int, word: str = "Question") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {i}?", "completion": f"Answer {i}."} for i in range(count)]


def kinds(path: Path) -> list[tuple[int, str]]:
    return [(fault.line, fault.kind) for fault in check([path]).faults]


def questions(source: Path | str) -> list[tuple[int, str]]:
    return [(c.line, c.messages[0].content) for c in show(source, 99)]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_is_read_row_by_row(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": MESSAGES}, *pairs(2)], indent=indent))

    lines = [1, 1, 1] if indent is None else [2, 14, 18]
    assert questions(path) == list(zip(lines, ["Hi?", "Question 0?", "Question 1?"], strict=True))
    assert check([path]).faults == []


def test_json_array_larger_than_the_window(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"prompt": f"{i} {'long ' * 20_000}", "completion": "Yes."} for i in range(30)]
    path.write_text(json.dumps(rows))

    assert check([path]).files[0].rows == 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"prompt": "a", "completion": "b"},\n{"prompt": ]', [(2, "broken-json")]),
        ('[{"prompt": "a", "completion": "b"}\n{"prompt": "c"}]', [(2, "broken-json")]),
        ('[{"prompt": "a", "completion": "b"}', [(1, "broken-json")]),
        ('[{"prompt": "a", "completion": "b"}]\nx', [(2, "broken-json")]),
        (
            '[\n17,\n{"prompt": "a", "prompt": "a", "completion": "b"}]',
            [(2, "not-an-object"), (3, "repeated-key")],
        ),
        ("[]", [(0, "no-rows")]),
        (f'[{{"prompt": "{"x" * LINE_LIMIT * 2}", "completion": "b"}}]', [(1, "line-too-long")]),
        ('[\n{"prompt": "a", "completion": 5}]', [(2, "wrong-type")]),
    ],
)
def test_faults_of_an_array_have_lines(
    tmp_path: Path, text: str, expected: list[tuple[int, str]]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)

    assert kinds(path) == expected


def test_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(3)))

    assert [line for line, _ in questions(path)] == [1, 2, 3]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_and_tsv(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream, delimiter=delimiter)
        rows.writerow(["instruction", "input", "output", "system"])
        rows.writerow(["Sort.", "b\na", "a, b", ""])
        rows.writerow(["Say hi.", "", 'He said "hi"', "Be kind."])

    found = [[m.to_dict() for m in c.messages] for c in show(path, 9)]
    assert found == [
        [{"role": "user", "content": "Sort.\n\nb\na"}, {"role": "assistant", "content": "a, b"}],
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Say hi."},
            {"role": "assistant", "content": 'He said "hi"'},
        ],
    ]
    assert [line for line, _ in questions(path)] == [2, 4]


def test_csv_with_messages_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerows([["messages"], [json.dumps(MESSAGES)], ["[{"]])

    assert len(show(path, 9)) == 1
    assert kinds(path) == [(3, "broken-json")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,completion\na,b,c\nd,e\n", [(2, "broken-csv")]),
        ("prompt,prompt\na,b\n", [(1, "repeated-key")]),
        ('prompt,completion\na,"b\n', [(2, "broken-csv")]),
        ("prompt,completion\na,\n", [(2, "unknown-format")]),
        ("prompt,completion\n", [(0, "no-rows")]),
        ("", [(0, "no-rows")]),
    ],
)
def test_faults_of_csv_have_lines(
    tmp_path: Path, text: str, expected: list[tuple[int, str]]
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)

    assert kinds(path) == expected


def test_parquet_with_nested_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"messages": MESSAGES, "prompt_id": "x"}]), path)

    (conversation,) = show(path, 9)
    assert conversation.to_dict() == {"messages": MESSAGES, "prompt_id": "x"}


def test_parquet_fault_has_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [*pairs(2), {"prompt": "a", "completion": None}]
    parquet.write_table(pa.Table.from_pylist(rows), path)

    assert kinds(path) == [(3, "unknown-format")]


def test_broken_parquet_is_one_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no more")

    assert kinds(path) == [(0, "broken-parquet")]


def test_folder_is_its_chat_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "b.jsonl").write_text(json.dumps(pairs(1, "B")[0]))
    (tmp_path / "more" / "c.json").write_text(json.dumps(pairs(1, "C")))
    (tmp_path / "a.csv").write_text("prompt,completion\nA 0?,Yes.\n")
    (tmp_path / "README.md").write_text("not chats")

    assert [c.messages[0].content for c in read_conversations([tmp_path])] == [
        "A 0?",
        "B 0?",
        "C 0?",
    ]
    before = fingerprints([tmp_path])
    (tmp_path / "b.jsonl").write_text(json.dumps(pairs(1, "X")[0]))
    assert [a == b for a, b in zip(before, fingerprints([tmp_path]), strict=True)] == [
        True,
        False,
        True,
    ]


def test_a_rewritten_file_has_another_fingerprint(tmp_path: Path) -> None:
    """Its hash is kept only while size and time of the file stay as they are."""
    path = tmp_path / "a.jsonl"
    found = []
    for number, text in enumerate((b"one", b"two", b"three")):
        path.write_bytes(text)
        os.utime(path, ns=(number, number))
        found += fingerprints([path])

    assert found == [hashlib.sha256(text).hexdigest() for text in (b"one", b"two", b"three")]


def test_sources_of_all_kinds_are_prepared_together(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(pairs(6, "A")))
    (tmp_path / "b.csv").write_text("prompt,completion\nB 0?,Yes.\n")
    run = Run.open(tmp_path / "run")
    outputs = prepare(DataSection(train=[tmp_path / "a.json", tmp_path / "b.csv"]), run).outputs

    assert (outputs["train"].rows, outputs["validation"].rows) == (6, 1)
    rows = (run.path / "data" / "train.jsonl").read_text().splitlines()
    assert all(json.loads(row)["messages"][1]["role"] == "assistant" for row in rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:", HubSet()),
        ("hub:a/b", HubSet(name="a/b")),
        ("hub:a/b:train[:5%]", HubSet(name="a/b", split="train[:5%]")),
        ("hub:a/b@v1:test", HubSet(name="a/b", revision="v1", split="test")),
    ],
)
def test_short_form_of_a_hub_set(text: str, expected: HubSet) -> None:
    assert HubSet.parse(text) == expected
    assert HubSet.parse(str(expected)) == expected


def test_default_hub_set_is_that_of_the_tutorials() -> None:
    assert str(HubSet()) == "hub:HuggingFaceH4/ultrachat_200k:train_sft[:1%]"


def test_recipe_takes_hub_sets_and_folders(tmp_path: Path) -> None:
    (tmp_path / "chats").mkdir()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: {name_or_path: x/y}\n"
        "data:\n  train: ['hub:', chats]\n  validation: hub:a/b:test\n"
    )
    data = load_recipe(recipe).data

    assert data.train == [HubSet(), tmp_path / "chats"]
    assert data.validation == [HubSet(name="a/b", split="test")]


@pytest.mark.parametrize("value", ["hub:", "[hub:]", "hub:HuggingFaceH4/ultrachat_200k"])
def test_default_set_as_it_is_typed_in_a_recipe_or_on_the_command_line(
    tmp_path: Path, value: str
) -> None:
    """YAML takes a bare `hub:` for a mapping."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nmodel: {name_or_path: x/y}\ndata: {train: [a/b.jsonl]}\n")

    assert load_recipe(recipe, [f"data.train={value}"]).data.train == [HubSet()]


def test_source_that_is_no_text_is_reported(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nmodel: {name_or_path: x/y}\ndata: {train: [{hub: a/b}]}\n")

    with pytest.raises(RecipeError, match=r"data\.train\.0: expected a file, a folder"):
        load_recipe(recipe)


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set with the layout of a hub repository, read by the same function."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"Q {i}?",
            "messages": [
                {"content": f"Q {i}?", "role": "user"},
                {"content": "Yes.", "role": "assistant"},
            ],
        }
        for i in range(20)
    ]
    rows[5] = rows[4]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_share_of_a_set(hub_folder: Path) -> None:
    assert [q for _, q in questions(f"hub:{hub_folder}:train[:20%]")] == [
        f"Q {i}?" for i in range(4)
    ]


def test_repeated_rows_of_a_set_are_removed_and_listed(hub_folder: Path, tmp_path: Path) -> None:
    source = HubSet(name=str(hub_folder), split="train")
    run = Run.open(tmp_path / "run")
    manifest = prepare(DataSection(train=[source]), run)

    assert manifest.removed == {"duplicate": 1}
    assert sum(part.rows for part in manifest.outputs.values()) == 19
    report = (run.path / "data-report.txt").read_text()
    assert (
        f"removed: hub:{hub_folder}:train:6: the same conversation as hub:{hub_folder}:train:5"
        in report
    )


def test_split_that_is_not_there_is_one_fault(hub_folder: Path, tmp_path: Path) -> None:
    source = HubSet(name=str(hub_folder), split="valid")
    with pytest.raises(DataError, match="cannot be read as a data set"):
        prepare(DataSection(train=[source]), Run.open(tmp_path / "run"))


def test_unreachable_hub_is_one_fault_that_says_so() -> None:
    (fault,) = check([f"hub:{DEFAULT_SET}"]).faults

    assert (fault.line, fault.kind) == (0, "hub-set")
    assert str(fault).startswith("hub:HuggingFaceH4/ultrachat_200k:train_sft[:1%]: ")
    assert "the network" in fault.fix
