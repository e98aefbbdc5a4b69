"""`phi3 azure check-live --rehearse`: each step through the unmodified SDKs, without an account."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import find, held, stop

from .conftest import Laptop

LIMIT = 300.0


@pytest.mark.slow
def test_each_step_passes_but_the_prices_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    laptop = Laptop(tmp_path / "home", tmp_path)
    azure = tmp_path / "runs" / "rehearsal" / "azure"
    command = [sys.executable, "-m", "phi3_training.cli", "azure", "check-live"]
    with (tmp_path / "told.txt").open("w+") as told:
        process = subprocess.Popen(
            [*command, "--rehearse", "--yes"],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=laptop.environment(),
        )
        try:
            ends = time.monotonic() + LIMIT
            while process.poll() is None:
                assert time.monotonic() < ends, "it did not end"
                time.sleep(1)
                running = find(azure)
                # The two minutes in which the node idles, in some seconds.
                if running and any("/jobs/" in str(call["path"]) for call in running.calls()):
                    running.advance(20)
        finally:
            process.kill()
            process.wait(30)
            stop(azure)
        told.seek(0)
        said = told.read()
    states = re.findall(r"^(passed|FAILED|skipped|by hand) +(.*)$", said, re.MULTILINE)
    assert [state for state, _ in states] == [
        *("passed", "passed", "FAILED", "passed", "passed"),  # step 3: there is no price list
        *("passed", "passed", "passed", "by hand", "passed"),
    ], said
    assert process.returncode == 1
    assert "later the cluster had no node any more" in said
    assert set(held(azure)) <= {"deletedVaults", "deletedWorkspaces"}  # names, kept for some days
