"""Preparing: whole files or none, a seeded split without leaks, a manifest that can be believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from phi3_training.data import prepare
from phi3_training.errors import DataError
from phi3_training.recipe import DataSection
from phi3_training.run import Run


def write_rows(path: Path, questions: Iterable[str], answer: str = "Yes.") -> Path:
    lines = [json.dumps({"prompt": question, "completion": answer}) for question in questions]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def questions_in(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["messages"][0]["content"] for row in rows]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run")


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", [f"Question {i}?" for i in range(50)])


def contents(run: Run) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file()
    }


def test_own_validation_file_wins(tmp_path: Path, run: Run, train: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", ["Another?"])
    old = write_rows(tmp_path / "old.jsonl", ["Older?", "Oldest?"])

    manifest = prepare(DataSection(train=[train], validation=[held], replay=[old]), run)

    assert {name: part.rows for name, part in manifest.outputs.items()} == {
        "train": 50,
        "validation": 1,
        "replay": 2,
    }
    assert questions_in(run.path / "data" / "train.jsonl") == [f"Question {i}?" for i in range(50)]
    assert questions_in(run.path / "data" / "validation.jsonl") == ["Another?"]
    assert manifest.choices == []


def test_manifest_records_what_went_in_and_came_out(run: Run, train: Path) -> None:
    manifest = prepare(DataSection(train=[train], seed=7), run)

    (given,) = manifest.inputs["train"]
    assert given.model_dump() == {
        "path": str(train),
        "sha256": hashlib.sha256(train.read_bytes()).hexdigest(),
        "bytes": train.stat().st_size,
        "rows": 50,
        "formats": {"prompt/completion": 50},
    }
    for part in manifest.outputs.values():
        written = (run.path / part.path).read_bytes()
        assert part.sha256 == hashlib.sha256(written).hexdigest()
        assert part.rows == written.count(b"\n")
    assert manifest.seed == 7
    assert manifest.settings["validation_share"] == 0.2
    assert manifest.seconds is not None
    assert manifest.choices[0].startswith("held out: 10 of 50 conversations")
    json.dumps(manifest.as_json())


def test_split_is_disjoint_whole_and_seeded(tmp_path: Path, train: Path) -> None:
    splits = {}
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run = Run.open(tmp_path / name)
        prepare(DataSection(train=[train], validation_share=0.3, seed=seed), run)
        splits[name] = contents(run)
        held = questions_in(run.path / "data" / "validation.jsonl")
        rest = questions_in(run.path / "data" / "train.jsonl")
        assert (len(held), len(rest)) == (15, 35)
        assert sorted(held + rest) == sorted(f"Question {i}?" for i in range(50))

    assert splits["a"] == splits["b"]
    assert splits["a"] != splits["c"]


def test_split_keeps_the_same_question_on_one_side(tmp_path: Path, run: Run) -> None:
    first = write_rows(tmp_path / "a.jsonl", [f"Question {i}?" for i in range(20)], "Yes.")
    second = write_rows(tmp_path / "b.jsonl", [f"question {i}" for i in range(20)], "No.")

    prepare(DataSection(train=[first, second], validation_share=0.5), run)

    held, rest = (
        {question.lower().rstrip("?") for question in questions_in(run.path / "data" / name)}
        for name in ("validation.jsonl", "train.jsonl")
    )
    assert len(held) == 10
    assert held.isdisjoint(rest)


def test_a_single_question_cannot_be_split(tmp_path: Path, run: Run) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["Alone?"])

    with pytest.raises(DataError, match=r"none can be held out; .*data\.validation"):
        prepare(DataSection(train=[path]), run)

    assert set(contents(run)) == {"data-faults.txt"}


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_neither_side_of_a_split_is_empty(run: Run, train: Path, share: float) -> None:
    outputs = prepare(DataSection(train=[train], validation_share=share), run).outputs

    assert min(outputs["train"].rows, outputs["validation"].rows) == 1


@pytest.mark.parametrize("question", ["Question 3?", "question 3", "  QUESTION  3 ? "])
@pytest.mark.parametrize("answer", ["Yes.", "Another answer."])
def test_trained_question_must_not_be_held_out(
    tmp_path: Path, run: Run, train: Path, question: str, answer: str
) -> None:
    held = write_rows(tmp_path / "held.jsonl", ["New?", question], answer)

    with pytest.raises(DataError) as caught:
        prepare(DataSection(train=[train], validation=[held]), run)

    (fault,) = caught.value.faults
    assert str(fault).startswith(f"{held}:2: held out, but {train}:4 trains on the same question")


def test_replayed_question_must_not_be_held_out(tmp_path: Path, run: Run, train: Path) -> None:
    old = write_rows(tmp_path / "old.jsonl", ["Older?"])
    held = write_rows(tmp_path / "held.jsonl", ["Older?"], "Something else.")

    with pytest.raises(DataError, match=r"held\.jsonl:1: held out, but .*old\.jsonl:1"):
        prepare(DataSection(train=[train], validation=[held], replay=[old]), run)


def chat(*contents: str) -> str:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return json.dumps({"messages": messages}) + "\n"


def test_same_question_in_another_context_is_no_leak(tmp_path: Path, run: Run) -> None:
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text(chat("The tent?", "Fine.", "How heavy?", "Two kilos."))
    held.write_text(chat("The pot?", "Good.", "How heavy?", "One kilo."))

    manifest = prepare(DataSection(train=[train], validation=[held]), run)

    assert manifest.outputs["validation"].rows == 1


def test_nothing_is_written_when_anything_is_wrong(tmp_path: Path, run: Run, train: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", ["New?"])
    with held.open("a") as stream:
        stream.write("{\n" * 30)

    with pytest.raises(DataError) as caught:
        prepare(DataSection(train=[train], validation=[held]), run)

    assert set(contents(run)) == {"data-faults.txt"}
    report = (run.path / "data-faults.txt").read_text(encoding="utf-8").splitlines()
    assert report == [str(fault) for fault in caught.value.faults]
    assert len(report) == 30
    assert report[29].startswith(f"{held}:31:2: broken JSON at the end of the line")
    assert f"first at {held}:2:2, 3, 4, 5, 6 …" in str(caught.value)
    assert f"Full list: {run.path / 'data-faults.txt'}" in str(caught.value)


def test_faults_of_all_files_come_together(tmp_path: Path, run: Run) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for path in paths:
        path.write_text("17\n")

    with pytest.raises(DataError) as caught:
        prepare(DataSection(train=paths[:1], validation=paths[1:2], replay=paths[2:]), run)

    places = [str(fault).split(": ")[0] for fault in caught.value.faults]
    assert places == [f"{tmp_path}/{name}.jsonl:1" for name in ("a", "c", "b")]


def test_failed_preparation_keeps_the_chats_of_the_last(run: Run, train: Path) -> None:
    prepare(DataSection(train=[train]), run)
    before = contents(run)
    train.write_text("oops\n")

    with pytest.raises(DataError):
        prepare(DataSection(train=[train]), run)

    after = contents(run)
    assert after.pop("data-faults.txt")
    assert after == before


def test_success_takes_old_files_and_reports_away(tmp_path: Path, run: Run, train: Path) -> None:
    old = write_rows(tmp_path / "old.jsonl", ["Older?"])
    prepare(DataSection(train=[train], replay=[old]), run)
    (run.path / "data-faults.txt").write_text("old")
    (run.path / ".data.new").mkdir()
    (run.path / ".data.new" / "train.jsonl").write_text("half a li")

    prepare(DataSection(train=[train]), run)

    assert set(contents(run)) == {
        "data/train.jsonl",
        "data/validation.jsonl",
        "data-origins.json",
    }
    assert not (run.path / ".data.new").exists()


@pytest.mark.parametrize("part", ["train", "validation", "replay"])
def test_file_named_twice_is_one_fault(run: Run, train: Path, part: str) -> None:
    sections: dict[str, Any] = {"train": [train]}
    sections[part] = [*sections.get(part, []), train.parent / "." / "run" / ".." / train.name]

    with pytest.raises(DataError) as caught:
        prepare(DataSection(**sections), run)

    assert [
        f"named twice, under data.train and data.{part}" in str(f) for f in caught.value.faults
    ] == [True]
