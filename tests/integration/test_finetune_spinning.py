"""torch is loaded with threads that soon sleep; the setting stays in no environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from phi3_training.finetune.runtime import import_torch_without_spinning
seen = []
sys.addaudithook(
    lambda event, args: seen.append(os.environ.get("GOMP_SPINCOUNT"))
    if event == "import" and args[0] == "torch" else None
)
import_torch_without_spinning()
print(seen[0] if seen else "not imported", os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "2000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "not imported 7"),
        ({"OMP_WAIT_POLICY": "active"}, "not imported None"),
    ],
)
def test_threads_sleep_unless_the_user_says_otherwise(given: dict[str, str], expected: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**clean, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected
