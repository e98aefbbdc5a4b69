"""The serving benchmark's short look works: every side answers, and its JSON has the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a minute of computing: `make test-all`

COMMAND = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def run(*arguments: str) -> tuple[list[str], dict[str, object]]:
    command = [sys.executable, str(COMMAND), "--quick", "--seconds", "0.01", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


def test_a_short_look_compares_all_sides() -> None:
    lines, found = run()
    rows = found["rows"]
    assert isinstance(rows, list)
    sides = {(row["side"], row["users"]) for row in rows}
    names = ("ours int4", "ours int8", "genai int4", "hugging face")
    assert sides == {(name, users) for name in names for users in (1, 4)}
    assert all(row["tokens_per_second"] > 0 and row["first_p95"] > 0 for row in rows)
    assert any("llama.cpp is left out" in line for line in lines)


def test_memory_over_many_requests() -> None:
    _, found = run("--requests", "300", "--precisions", "int8")
    sizes = found["rss_mib"]
    assert isinstance(sizes, list)
    assert len(sizes) == 10
    assert sizes[-1] - sizes[3] < 20
