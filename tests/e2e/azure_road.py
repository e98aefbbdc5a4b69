"""A user's machine in front of a rehearsed Azure: runs `phi3`, and kills it where asked.

Commands run one after the other in a process that stays, for the SDKs take seconds to import.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import forked

from phi3_rehearsal import Rehearsal, start

from .conftest import Laptop

SMALL = Path(__file__).parent / "small_azure"  # a recipe and its chats
RUN = "small-azure"
UP = ("up", "small.yaml", "--on", "azure")
_SHELL = """
import contextlib, io, json, sys
from phi3_training.cli import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(json.loads(line))
        except SystemExit as ended:
            status = ended.code
    answer = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
    sys.__stdout__.write(json.dumps(answer) + chr(10))
    sys.__stdout__.flush()
"""


@dataclass(frozen=True)
class Done:
    """What became of a command."""

    returncode: int
    stdout: str
    stderr: str


class Shell:
    """Calls `phi3` again and again in one process."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        given, ask = os.pipe()
        answers, answer = os.pipe()
        with (
            os.fdopen(given) as stdin,
            os.fdopen(answer, "w") as stdout,
            (folder / "shell.log").open("w") as stderr,
        ):
            self._process = forked.start(
                ["-c", _SHELL],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env=environment,
            )
        self._write, self._read = os.fdopen(ask, "w"), os.fdopen(answers)

    def call(self, words: list[str]) -> dict[str, Any]:
        """Exit status and output of `phi3 WORDS…`."""
        self._write.write(json.dumps(words) + "\n")
        self._write.flush()
        answer: dict[str, Any] = json.loads(self._read.readline())
        return answer

    def close(self) -> None:
        """End it."""
        self._write.close()
        self._process.wait(60)
        self._read.close()


@dataclass
class Road:
    """The laptop, the rehearsed Azure, and what `phi3` printed. Laid out as --rehearse does."""

    laptop: Laptop
    rehearsal: Rehearsal
    printed: list[str] = field(default_factory=list)
    _shell: Shell | None = None

    @classmethod
    def begin(cls, home: Path, work: Path) -> Road:
        shutil.copytree(SMALL, work, dirs_exist_ok=True)
        with forked.forked_modules():
            rehearsal = start(work / "runs" / "rehearsal" / "azure")
        return cls(Laptop(home, work), rehearsal)

    @property
    def runs(self) -> Path:
        return self.laptop.work / "runs" / "rehearsal" / "runs"

    @property
    def run_folder(self) -> Path:
        return self.runs / RUN

    def manifest(self, stage: str) -> dict[str, object]:
        loaded: dict[str, object] = json.loads((self.run_folder / f"{stage}.json").read_text())
        return loaded

    def environment(self) -> dict[str, str]:
        """What leads the official SDKs to the rehearsed Azure, and nothing else."""
        store = str(self.runs.parent / "promptflow")
        return self.laptop.environment(**self.rehearsal.env, PF_HOME_DIRECTORY=store)

    def phi3(self, *words: str, secret: bool = False) -> Done:
        if self._shell is None:
            self._shell = Shell(self.laptop.work, self.environment())
        answer = self._shell.call([*words, "--runs", str(self.runs)])
        if not secret:
            self.printed.append(answer["out"] + answer["err"])
        return Done(answer["status"], answer["out"], answer["err"])

    def close(self) -> None:
        if self._shell is not None:
            self._shell.close()
        self.rehearsal.close()

    def up(self, *words: str) -> Done:
        return self.phi3(*UP, *words)

    def rehearse(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As a user types it, without any variable set."""
        done = self.laptop.run("phi3", *words, "--rehearse", timeout=400)
        self.printed.append(done.stdout + done.stderr)
        return done

    def kill_at(self, method: str, path: str, command: Sequence[str] = UP) -> None:
        """`phi3` with that command, killed once the rehearsed Azure has answered such a call."""
        seen = len(self.rehearsal.calls())
        with tempfile.TemporaryFile("w+") as told:
            process = forked.start(
                ["-m", "phi3_training.cli", *command, "--runs", str(self.runs)],
                stdout=told,
                stderr=told,
                cwd=self.laptop.work,
                env=self.environment(),
            )
            deadline = time.monotonic() + 300
            try:
                while not self.called(method, path, since=seen):
                    if process.poll() is not None:
                        told.seek(0)
                        raise AssertionError(f"it ended before {method} {path}: {told.read()}")
                    assert time.monotonic() < deadline, f"it never came to {method} {path}"
                    time.sleep(0.02)
            finally:
                process.kill()
                process.wait(30)

    def called(self, method: str, path: str, since: int = 0) -> list[str]:
        """The paths of the calls since then that fit."""
        return [
            str(call["path"])
            for call in self.rehearsal.calls()[since:]
            if call["method"] == method and re.search(path, str(call["path"]))
        ]

    def made(self, kind: str) -> set[str]:
        """The names under which something of a kind was ever put."""
        pattern = rf"/{kind}/([^/?]+)$"
        return {
            match[1]
            for path in self.called("PUT", pattern)
            if (match := re.search(pattern, path)) is not None
            and "Microsoft.Resources/deployments" not in path
        }
