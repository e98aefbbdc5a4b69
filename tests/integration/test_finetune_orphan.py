"""Training processes end with the `phi3` that began them, also after kill -9."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from phi3_training.finetune.launch import GONE, WORKER
from phi3_training.processes import start_time

# Starts another process that watches this one, says its number, and waits.
STARTER = """
import os, subprocess, sys
from phi3_training.processes import start_time
code = (
    "import sys, time; from phi3_training.finetune.launch import end_with;"
    "end_with(int(sys.argv[1]), float(sys.argv[2])); print('watching', flush=True);"
    "time.sleep(600)"
)
me = [str(os.getpid()), repr(start_time(os.getpid()))]
between = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
command = [sys.executable, "-c", code, *me]
if sys.argv[1] == "through another":
    command = [sys.executable, "-c", between, "-c", code, *me]
worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends kill -9")
@pytest.mark.parametrize("way", ["directly", "through another"])
def test_no_process_outlives_its_killed_starter(way: str) -> None:
    """Of three generations, as with torchrun between, the eldest is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, way], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        begun = psutil.Process(int(starter.stdout.readline()))
        family = [begun, *begun.children(recursive=True)]
        assert len(family) == (1 if way == "directly" else 2)
        starter.kill()
    deadline = time.monotonic() + 240
    while any(process.is_running() and not is_dead(process) for process in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_worker_without_its_launcher_trains_nothing(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as gone:
        launcher = [gone.pid, start_time(gone.pid)]
        gone.communicate()
    plan = tmp_path / "launch.json"
    plan.write_text(json.dumps({"recipe": {}, "launcher": launcher, "result": "", "run": ""}))
    done = subprocess.run([sys.executable, "-m", WORKER, str(plan)], check=False, timeout=120)
    assert done.returncode == GONE
