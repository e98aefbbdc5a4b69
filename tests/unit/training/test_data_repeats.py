"""Rows that are there twice or nearly twice: found, kept on one side, removed or told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from phi3_training.data import check, prepare
from phi3_training.data.digest import BANDS, Batch, Measure, sketch
from phi3_training.data.findings import first_of
from phi3_training.errors import DataError
from phi3_training.recipe import DataSection
from phi3_training.run import Run

CHANCE = random.Random(11)  # noqa: S311 - test data
WORDS = ["".join(CHANCE.choices("etaoinshrdlu", k=CHANCE.randint(2, 8))) for _ in range(3000)]


def text(seed: int, words: int) -> str:
    chance = random.Random(seed)  # noqa: S311 - test data
    return " ".join(chance.choices(WORDS, k=words))


def changed(original: str, words: int, seed: int = 1) -> str:
    """The text with so many of its words replaced."""
    chance = random.Random(seed)  # noqa: S311 - test data
    found = original.split()
    for place in chance.sample(range(len(found)), words):
        found[place] = chance.choice(WORDS)
    return " ".join(found)


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"prompt": ask, "completion": answer}) for ask, answer in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def near_lines(path: Path) -> list[int]:
    return [w.line for w in check([path]).warnings if w.kind == "near-duplicate"]


def test_long_rows_nearly_alike_are_reported_with_both_places(tmp_path: Path) -> None:
    answer = text(1, 400)
    rows = [("One?", answer), ("Two?", text(2, 400)), ("One more?", changed(answer, 5))]
    path = write(tmp_path / "a.jsonl", rows)

    (warning,) = check([path]).warnings
    assert (warning.line, warning.kind) == (3, "near-duplicate")
    assert warning.what == f"nearly the same conversation as {path}:1"


@pytest.mark.parametrize("words", [100, 200, 400])
def test_rows_with_a_quarter_of_other_words_are_not_alike(tmp_path: Path, words: int) -> None:
    answer = text(3, 400)

    assert (
        near_lines(write(tmp_path / "a.jsonl", [("A?", answer), ("B?", changed(answer, words))]))
        == []
    )


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ("what is the price of the MOSSBACK tent", [2]),
        ("What is the price of the Alder tent?", []),
        ("What is the price of the Mossback tent now?", []),
    ],
)
def test_in_short_rows_one_other_word_counts(tmp_path: Path, other: str, found: list[int]) -> None:
    """Templates with one name changed are what small sets are made of."""
    rows = [("What is the price of the Mossback tent?", "240 dollars."), (other, "240 dollars!")]

    assert near_lines(write(tmp_path / "a.jsonl", rows)) == found


def test_same_system_prompt_makes_no_rows_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    system = {"role": "system", "content": text(5, 500)}
    rows = [
        [
            system,
            {"role": "user", "content": f"Question {i}?"},
            {"role": "assistant", "content": f"Answer {i}"},
        ]
        for i in range(5)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))

    assert check([path]).warnings == []


def test_nearly_all_near_duplicates_are_found() -> None:
    """Of pairs that are measured as alike, 97 of 100 share a number of their sketch."""
    pairs = [(text(seed, 300), changed(text(seed, 300), 4, seed)) for seed in range(300)]
    first = sketch(Batch.of([a.encode() for a, _ in pairs]))
    second = sketch(Batch.of([b.encode() for _, b in pairs]))
    close = [Measure(a.encode()).near(Measure(b.encode())) for a, b in pairs]

    shared = ((first == second) & (first != 0)).any(axis=1)
    assert sum(close) > 200
    assert int((shared & np.array(close)).sum()) >= 0.97 * sum(close)
    assert len(np.unique(first)) > 290 * BANDS


def test_sketch_of_a_text_does_not_depend_on_its_neighbours() -> None:
    texts = [text(seed, 10 * seed).encode() for seed in range(1, 60)]

    alone = [sketch(Batch.of([item]))[0].tolist() for item in texts]
    assert sketch(Batch.of(texts)).tolist() == alone


def test_first_of_names_the_first_equal_entry() -> None:
    assert first_of(np.array([5, 3, 5, 9, 3, 5], np.uint64)).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of(np.zeros(0, np.uint64)).tolist() == []


@pytest.fixture
def long_rows() -> list[tuple[str, str]]:
    return [(f"Question {i}?", text(i, 300)) for i in range(20)]


def test_removed_rows_are_listed_and_gone(tmp_path: Path, long_rows: list[tuple[str, str]]) -> None:
    near = ("Question 3 again?", changed(long_rows[3][1], 3))
    path = write(tmp_path / "a.jsonl", [*long_rows, long_rows[2], near])
    run = Run.open(tmp_path / "run")
    data = DataSection(train=[path], duplicates="remove", near_duplicates="remove")
    manifest = prepare(data, run)

    assert manifest.removed == {"duplicate": 1, "near-duplicate": 1}
    assert sum(part.rows for part in manifest.outputs.values()) == 20
    assert (run.path / manifest.report).read_text().splitlines() == [
        f"removed: {path}:21: the same conversation as {path}:3",
        f"removed: {path}:22: nearly the same conversation as {path}:4",
    ]
    assert "removed: 1 row (duplicate), listed in data-report.txt" in manifest.choices


def test_duplicates_of_local_files_are_refused_by_default(
    tmp_path: Path, long_rows: list[tuple[str, str]]
) -> None:
    path = write(tmp_path / "a.jsonl", [*long_rows, long_rows[2]])

    with pytest.raises(DataError, match=r"a\.jsonl:21: the same conversation as .*a\.jsonl:3"):
        prepare(DataSection(train=[path]), Run.open(tmp_path / "run"))


@pytest.mark.parametrize("seed", range(6))
def test_near_duplicates_stay_on_one_side_of_the_split(tmp_path: Path, seed: int) -> None:
    """A held-out row that is nearly a trained one would flatter the model."""
    rows = [(f"Question {i}?", text(i, 300)) for i in range(10)]
    rows += [(f"Again {i}?", changed(answer, 4)) for i, (_, answer) in enumerate(rows)]
    path = write(tmp_path / "a.jsonl", rows)
    run = Run.open(tmp_path / "run")
    prepare(DataSection(train=[path], validation_share=0.5, seed=seed), run)

    held = (run.path / "data" / "validation.jsonl").read_text()
    asked = [{i for i in range(10) if f"{word} {i}?" in held} for word in ("Question", "Again")]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 5


def test_held_out_row_nearly_like_a_trained_one_is_reported(
    tmp_path: Path, long_rows: list[tuple[str, str]]
) -> None:
    train = write(tmp_path / "train.jsonl", long_rows)
    held = write(
        tmp_path / "held.jsonl", [("Else?", "Yes."), ("New?", changed(long_rows[7][1], 3))]
    )
    run = Run.open(tmp_path / "run")
    manifest = prepare(DataSection(train=[train], validation=[held]), run)

    assert manifest.outputs["validation"].rows == 2
    assert (
        (run.path / "data-report.txt")
        .read_text()
        .startswith(
            f"warning: {held}:2: held out, but nearly the same as {train}:8, which is trained on;"
        )
    )


def test_leaks_are_removed_where_duplicates_are(
    tmp_path: Path, long_rows: list[tuple[str, str]]
) -> None:
    train = write(tmp_path / "train.jsonl", long_rows)
    held = write(tmp_path / "held.jsonl", [("Else?", "Yes."), ("question 7", "Other.")])
    data = DataSection(train=[train], validation=[held], duplicates="remove")
    manifest = prepare(data, Run.open(tmp_path / "run"))

    assert manifest.removed == {"leak": 1}
    assert manifest.outputs["validation"].rows == 1


def test_source_that_changes_while_it_is_read_stops_the_stage(
    tmp_path: Path, long_rows: list[tuple[str, str]]
) -> None:
    from phi3_training.data.scan import scan

    path = write(tmp_path / "a.jsonl", long_rows)
    (one,) = scan([("train", path)], tmp_path)
    assert not one.has_changed()
    write(path, long_rows[:3])

    assert one.has_changed()
