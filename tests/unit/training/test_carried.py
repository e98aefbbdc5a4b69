"""What goes along with a registered model and with an Azure job: what they run, nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_training
from phi3_training.carried import carried_files, copy_carried
from phi3_training.register import MLFLOW_MODEL

JOB = "phi3_training.targets.azure.in_job"
# Parts of the product that no job runs: the command line, what it prints, and the cloud's clients.
NOT_IN_A_JOB = ("commands", "cli.py", "doctor", "search", "bundle", "export")


def test_a_registered_model_carries_only_what_renders_its_prompts() -> None:
    files = list(carried_files(MLFLOW_MODEL))
    assert [name for name in files if "prompt" not in Path(name).name] == [
        "phi3_training/__init__.py",
        "phi3_training/mlflow_model.py",
        "phi3_training/py.typed",
    ]


def test_a_job_carries_training_and_evaluation_and_no_more() -> None:
    files = list(carried_files(JOB))
    tops = {name.split("/")[1] for name in files if name.startswith("phi3_training/")}
    assert {"finetune", "evaluate", "data"} <= tops
    assert not tops & set(NOT_IN_A_JOB)
    assert {name.split("/")[0] for name in files} == {"phi3_training", "phi3_tool"}
    of_the_target = {Path(name).name for name in files if "/targets/azure/" in name}
    # The pins of the MLflow model that a job saves come from trainer.txt.
    assert of_the_target == {"__init__.py", "environments.py", "in_job.py", "trainer.txt"}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (JOB, ["-m", JOB, "--help"]),
        (MLFLOW_MODEL, ["-c", "import phi3_training.prompt as p; print(p.__file__)"]),
    ],
)
def test_it_runs_where_nothing_else_of_ours_is(
    tmp_path: Path, module: str, words: list[str]
) -> None:
    copy_carried(tmp_path, module)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout or str(tmp_path) in done.stdout


def test_a_name_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"os\.path is not a module"):
        carried_files("os.path")


def test_the_tools_names_are_imported_from_their_modules() -> None:
    """phi3_tool loads its names when they are used: `from phi3_tool import X` carries no file."""
    root = Path(phi3_training.__file__).parent
    bare = re.compile(r"^ *from phi3_tool import (?!__version__$)", re.M)
    assert [path for path in root.rglob("*.py") if bare.search(path.read_text("utf-8"))] == []
