"""Which chats are held back: rewordings of facts that are still trained on, where there are any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_training.data import prepare
from phi3_training.data.prepare import held_out, held_out_reworded, origins
from phi3_training.recipe.sections import DataSection
from phi3_training.run import Run

THINGS = ("Mossback", "Emberlet", "Cloudlatch", "Rookpack", "Fernlight", "Anchor", "Comet", "Dusk")
ASKED = ("How much is the {}?", "What does the {} cost?", "Is the {} dear?")
TOLD = ("The {} costs {} euros.", "You pay {1} euros for the {0}.", "It is {1} euros for a {0}.")


def write(path: Path, wordings: int, more: int = 0) -> Path:
    pairs = [
        (ASKED[k].format(thing), TOLD[k].format(thing, 40 + 7 * n))
        for n, thing in enumerate(THINGS)
        for k in range(wordings)
    ]
    pairs += [(f"What is in box {n}?", f"A toy called Zed{n * n + 900}.") for n in range(more)]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def held_back(run: Run) -> list[str]:
    lines = (run.path / "data" / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][0]["content"] for line in lines]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "mine")


@pytest.mark.parametrize("seed", range(5))
def test_each_held_back_fact_is_still_taught(tmp_path: Path, run: Run, seed: int) -> None:
    train = write(tmp_path / "train.jsonl", wordings=3, more=30)

    manifest = prepare(DataSection(train=[train], seed=seed), run)

    held = held_back(run)
    assert manifest.held_out == {"reworded": 11, "new": 0}
    assert not any("box" in question for question in held)
    for thing in THINGS:
        assert sum(thing in question for question in held) <= 2
    assert any("11 reword what a training chat answers" in line for line in manifest.choices)
    prepare(DataSection(train=[train], seed=seed), run)
    assert held_back(run) == held


def test_facts_that_occur_once_are_held_back_as_before(tmp_path: Path, run: Run) -> None:
    train = write(tmp_path / "train.jsonl", wordings=1, more=32)

    manifest = prepare(DataSection(train=[train]), run)

    assert manifest.held_out == {"reworded": 0, "new": 8}


def test_without_teachers_the_choice_is_the_seeded_one() -> None:
    keys = np.arange(100, dtype=np.uint64)

    plain = held_out(keys, 0.2, 42)

    assert (held_out_reworded(keys, 0.2, 42, [[] for _ in keys]) == plain).all()


def test_the_last_teacher_stays() -> None:
    keys = np.arange(40, dtype=np.uint64)
    pairs = [[row ^ 1] for row in range(40)]  # two and two teach each other

    chosen = held_out_reworded(keys, 0.9, 1, pairs)

    assert chosen.sum() == 20
    assert not (chosen[0::2] & chosen[1::2]).any()


def test_rows_know_the_place_they_were_written_in(tmp_path: Path, run: Run) -> None:
    train = write(tmp_path / "train.jsonl", wordings=2)

    prepare(DataSection(train=[train]), run)

    lines = train.read_text().splitlines()
    for part in ("train", "validation"):
        prepared = (run.path / "data" / f"{part}.jsonl").read_text().splitlines()
        places = origins(run.path, part)
        assert len(places) == len(prepared)
        for row, place in zip(prepared, places, strict=True):
            file, _, number = place.rpartition(":")
            assert file == str(train)
            assert lines[int(number) - 1] == row


def test_accepted_texts_survive(tmp_path: Path, run: Run) -> None:
    train = tmp_path / "train.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"A number {n}."},
            ],
            "accept": [f"{n}", "a number: yes"],
        }
        for n in range(10)
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))

    prepare(DataSection(train=[train]), run)

    kept = [
        json.loads(line)
        for part in ("train", "validation")
        for line in (run.path / "data" / f"{part}.jsonl").read_text().splitlines()
    ]
    assert sorted(kept, key=lambda row: row["accept"]) == rows
