"""Files as people have them: packed, in other encodings, wrapped, and folders of all kinds."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from phi3_training.data import check, prepare, show
from phi3_training.data.readers import MOST_UNPACKED
from phi3_training.data.sources import rows_of
from phi3_training.recipe import DataSection
from phi3_training.run import Run


def pairs(count: int, word: str = "Question") -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {i}: café?", "completion": f"Answer {i}."} for i in range(count)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path) -> tuple[list[str], str]:
    """The first messages and the notes of a file, which has no fault."""
    report = check([path])
    assert [str(fault) for fault in report.faults] == []
    (file,) = report.files
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    raw = [row.value for row in rows_of(path)]
    assert len(raw) == file.rows
    return [c.messages[0].content for c in show(path, 999)], "; ".join(file.notes)


ASKED = [row["prompt"] for row in pairs(3)]


@pytest.mark.parametrize(
    "codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_every_encoding_of_every_kind(tmp_path: Path, codec: str, packed: bool, kind: str) -> None:
    rows = pairs(3)
    table = "prompt,completion\r\n" + "".join(f"{r['prompt']},{r['completion']}\r\n" for r in rows)
    text = {"jsonl": lines(rows), "json": json.dumps(rows), "csv": table}[kind]
    path = tmp_path / f"a.{kind}{'.gz' if packed else ''}"
    data = text.encode(codec)
    path.write_bytes(gzip.compress(data) if packed else data)

    asked, notes = read(path)
    assert asked == ASKED
    assert ("gzip" in notes) == packed
    assert ("byte-order mark" in notes) == (codec in ("utf-8-sig", "utf-16", "utf-32"))
    assert ("every other byte is zero" in notes) == codec.endswith(("le", "be"))


@pytest.mark.patient
def test_packed_lines_of_many_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    rows = [{"messages": [{"role": "user", "content": f"Question {i}?"},
                          {"role": "assistant", "content": f"{i} " + "x" * 900_000}]}
            for i in range(20)]  # fmt: skip
    path.write_bytes(gzip.compress(lines(rows).encode()))

    assert [c.line for c in show(path, 99)] == list(range(1, 21))
    assert check([path]).faults == []


def test_gzip_that_unpacks_to_too_much_is_refused_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * (MOST_UNPACKED + 1), 1))

    (fault,) = check([path]).faults
    assert fault.kind == "gzip-too-large"


def test_gzip_that_is_cut_short_is_one_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(lines(pairs(999)).encode())
    path.write_bytes(whole[: len(whole) // 2])

    assert "broken-gzip" in [fault.kind for fault in check([path]).faults]


def test_csv_with_other_separators(tmp_path: Path) -> None:
    for name, mark, first in (
        ("a.csv", ";", ""), ("b.csv", "\t", ""), ("c.tsv", "\t", ""), ("d.csv", ";", "sep=;\n"),
        ("e.csv", "|", ""),
    ):  # fmt: skip
        path = tmp_path / name
        rows = "".join(f"Question, {i}?{mark}Yes, {i}.\n" for i in range(2)).replace(
            ",", "" if mark == "," else ","
        )
        path.write_text(f"{first}prompt{mark}completion\n{rows}")

        asked, notes = read(path)
        assert len(asked) == 2, name
        assert ("separated by" in notes) == (name != "c.tsv")


def test_csv_may_begin_with_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\n \nquestion;answer\nHi?;"two\nlines"\nBye?;\n', encoding="utf-8")
    report = check([path])
    assert [c.line for c in show(path, 9)] == [4]
    assert [fault.line for fault in report.faults] == [6]


def test_csv_of_excel_is_read_as_windows_1252_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt;completion\r\nWas kostet der Käse – heute?;5 €.\r\n".encode("cp1252"))

    asked, notes = read(path)
    assert asked == ["Was kostet der Käse – heute?"]
    assert "Windows-1252" in notes
    assert "'Käse'" in notes


@pytest.mark.parametrize(
    "data", ["prompt,completion\nСколько стоит палатка?,Пять рублей.\n".encode("cp1251"),
             "prompt,completion\nCafé crème à côté?,Où ça é".encode() + b"\xe9.\n"]
)  # fmt: skip
def test_csv_that_is_neither_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(data)

    (fault,) = check([path]).faults
    assert fault.kind == "not-utf8"


def test_csv_row_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + '"a\nb",' * 300_000)

    (fault,) = check([path]).faults
    assert "longer than 1 MiB" in fault.what


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_wrapped_rows(tmp_path: Path, indent: int | None, name: str) -> None:
    path = tmp_path / name
    wrapped = {"version": "1", "tags": ["x"], "data": pairs(3), "license": "own"}
    path.write_text(json.dumps(wrapped, indent=indent))

    asked, notes = read(path)
    assert asked == ASKED
    assert "'data'" in notes


def test_a_large_wrapper_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"prompt": f"{i} {'long ' * 20_000}", "completion": "Yes."} for i in range(30)]
    path.write_text(json.dumps({"data": rows}))

    assert len(read(path)[0]) == 30


def test_two_lists_in_a_wrapper_are_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": pairs(2), "test": pairs(2, "T")}, indent=1))

    (fault,) = check([path]).faults
    assert "second list of rows" in fault.what


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_are_no_wrappers(tmp_path: Path, name: str, indent: int | None) -> None:
    path = tmp_path / name
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    path.write_text(json.dumps({"sources": [{"page": 1}], "messages": turns}, indent=indent))

    assert read(path)[0] == ["Hi?"]


def test_pretty_printed_rows_and_an_array_named_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row, indent=2) for row in pairs(3)))
    assert read(path)[0] == ASKED

    path.write_text(json.dumps(pairs(3), indent=2))
    asked, notes = read(path)
    assert asked == ASKED
    assert "array" in notes


@pytest.mark.parametrize("first", [b'{"messages": [', b"[1, 2]", b"[" * 5000, b'{"a": 1,}'])
def test_a_broken_first_line_leaves_json_lines_what_they_are(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(first + b"\n" + lines(pairs(3)).encode())

    assert [fault.line for fault in check([path]).faults] == [1]
    assert [c.line for c in show(path, 9)] == [2, 3, 4]


def test_faults_of_a_one_line_array_have_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = pairs(5)
    rows[1], rows[3] = {"prompt": "a"}, {"completion": "b"}
    rows[4] = rows[2]
    path.write_text(json.dumps(rows))

    faults = check([path]).faults
    assert [(f.line, f.row, f.as_dict()["row"]) for f in faults] == [(1, n, n) for n in (2, 4, 5)]
    assert f"{path}:1 (row 2): " in str(faults[0])
    assert f"{path}:1 (row 3)" in str(faults[2])


def test_files_that_are_no_text_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"PK\x03\x04" + bytes(99))

    (fault,) = check([path]).faults
    assert "Excel workbook" in fault.what


def test_folder_reads_what_is_for_training_and_says_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "train-checkpoint.jsonl").write_text(lines(pairs(5)))
    (folder / "train.jsonl").write_text(lines(pairs(5)))
    (folder / "train-2.jsonl.gz").write_bytes(gzip.compress(lines(pairs(3, "More")).encode()))
    (folder / "test.jsonl").write_text(lines(pairs(2, "Test")))
    (folder / "all.jsonl").write_text(lines(pairs(5)))
    (folder / "README.md").write_text("# Mine")

    report = check([folder])
    assert report.faults == []
    assert [(f.path.name, f.rows) for f in report.files] == [
        ("train-2.jsonl.gz", 3),
        ("train.jsonl", 5),
        ("test.jsonl", 2),
    ]
    said = "\n".join(report.lines())
    for name in ("train-checkpoint.jsonl", "test.jsonl", "all.jsonl", "README.md"):
        assert name in said
    manifest = prepare(DataSection(train=[folder]), Run.open(tmp_path / "run"))
    assert {part: one.rows for part, one in manifest.outputs.items()} == {
        "train": 8,
        "validation": 2,
    }
    assert any("held out" in choice and "test.jsonl" in choice for choice in manifest.choices)


def test_folder_with_a_named_held_out_file_leaves_its_own_unread(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(pairs(5)))
    (folder / "validation.jsonl").write_text(lines(pairs(2, "Held")))
    other = tmp_path / "other.jsonl"
    other.write_text(lines(pairs(1, "Other")))

    data = DataSection(train=[folder], validation=[other])
    outputs = prepare(data, Run.open(tmp_path / "run")).outputs
    assert {part: one.rows for part, one in outputs.items()} == {"train": 5, "validation": 1}
    both = DataSection(train=[folder], validation=[folder])
    outputs = prepare(both, Run.open(tmp_path / "run")).outputs
    assert {part: one.rows for part, one in outputs.items()} == {"train": 5, "validation": 2}


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Q {i}?", "weight": None},
                          {"role": "assistant", "content": f"A {i}.", "weight": 1}]}
            for i in range(6)]  # fmt: skip
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train_sft": one, "test_sft": datasets.Dataset.from_list(pairs(2))}
                         ).save_to_disk(tmp_path / "both")  # fmt: skip

    assert len(show(tmp_path / "one", 99)) == 6
    files = check([tmp_path / "both"]).files
    assert [(f.path.parent.name, f.rows) for f in files] == [("train_sft", 6), ("test_sft", 2)]
