"""Many processes and small blocks give what one process gives in one go."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from phi3_training.data.findings import Findings, Rules
from phi3_training.data.jsonl import Range, lines_of
from phi3_training.data.scan import scan

from .test_data_faults import BAD_LINES


def chat(number: int, length: int) -> bytes:
    answer = f"Answer {number}. " + "word " * length
    row = {"messages": [{"role": "user", "content": f"Question {number}?"}]}
    row["messages"].append({"role": "assistant", "content": answer})
    return json.dumps(row).encode()


def bad_file(path: Path, *, ending: bytes) -> Path:
    """Sound rows, every bad line, blank lines and Windows line ends, in a seeded order."""
    chance = random.Random(3)  # noqa: S311 - test data
    lines = [chat(number, chance.randrange(300)) for number in range(400)]
    lines += [chat(number, 3) + b"\r" for number in range(500, 520)]
    lines += [bad for bad, _, _ in BAD_LINES.values()]
    lines += [b""] * 40 + [b"x" * 1_100_000, chat(7, 1), chat(7, 1)]
    chance.shuffle(lines)
    path.write_bytes(b"\n".join([*lines, b"", b"", b""]) + ending)
    return path


class CountingFile(io.FileIO):
    """Counts the bytes that are read from it."""

    given = 0

    def readinto(self, buffer: Any, /) -> int | None:
        size = super().readinto(buffer)
        self.given += size or 0
        return size


def everything(path: Path, folder: Path, workers: int, block: int) -> dict[str, Any]:
    folder.mkdir()
    (one,) = scans = scan([("train", path)], folder, workers=workers, block=block)
    findings = Findings(scans, Rules())
    table = findings.table
    return {
        "faults": [fault.as_dict() for fault in findings.faults()],
        "counts": (one.rows, one.several_turns, dict(one.formats), one.size, one.sha256),
        "rows": [table.conversation(row) for row in range(len(table))],
        "sketch": table.bands.tolist(),
        "keys": (table.identity.tolist(), table.question.tolist()),
        "warnings": [str(warning) for warning in findings.warnings()],
    }


@pytest.mark.parametrize("ending", [b"", b"  \n", b"\n" + chat(9999, 2)])
def test_result_does_not_depend_on_processes_or_blocks(tmp_path: Path, ending: bytes) -> None:
    path = bad_file(tmp_path / "a.jsonl", ending=ending)
    whole = everything(path, tmp_path / "whole", 1, 1 << 30)

    assert len(whole["faults"]) > len(BAD_LINES)
    assert len(whole["rows"]) > 400
    for workers, block in [(1, 3_000), (3, 50_000), (2, 1 << 20)]:
        other = everything(path, tmp_path / f"{workers}-{block}", workers, block)
        assert other == whole, (workers, block)


def test_line_over_many_blocks_is_read_to_its_end_once(tmp_path: Path) -> None:
    """Else a file of one endless line would be read as often as it has blocks."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 4_000_000 + b"\n" + chat(1, 0))
    with CountingFile(path) as file:
        stream: Any = io.BufferedReader(file)
        starts = range(0, 4_000_000, 100_000)
        found = [list(lines_of(stream, Range(start, start + 100_000))) for start in starts]

        assert [len(block) for block in found] == [1] + [0] * 39
        assert found[0][0].size == 4_000_000
        assert file.given < 4 * 4_000_000


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_every_line_is_read_once_wherever_blocks_end(tmp_path: Path, block: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([chat(1, 0), b"", b"17", chat(2, 1), b"", b"", chat(3, 0)]))
    (one,) = scan([("train", path)], tmp_path, block=block)

    assert [
        line + first for d, first in zip(one.digests, one.firsts, strict=True) for line in d.line
    ] == [1, 4, 7]
    assert [(fault.line, fault.kind) for fault in sorted(one.faults, key=lambda f: f.line)] == [
        (3, "not-an-object"),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_blocks_that_were_read_are_counted(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(chat(number, 50) for number in range(60)) + b"\n")
    told: list[tuple[int, int, str]] = []
    scan(
        [("train", path)], tmp_path, workers=workers, block=4096,
        progress=lambda *said: told.append(said),
    )  # fmt: skip
    blocks = -(-path.stat().st_size // 4096)
    assert told == [(done, blocks, "reading a.jsonl") for done in range(1, blocks + 1)]
    assert blocks > 3
