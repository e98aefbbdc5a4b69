"""One of several training processes, started by launch.py: `python -m … worker PLAN`.

Reads the plan; the main process writes its progress to standard output and the result file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..errors import Phi3TrainingError
from ..recipe import Recipe
from ..run import Run, write_atomically
from .launch import end_with
from .runtime import is_main_process


def main(plan: Path) -> int:
    """Train; exit status 1 when something stopped it."""
    content = json.loads(plan.read_text(encoding="utf-8"))
    end_with(*content["launcher"])
    from . import sft  # takes seconds, in which the launcher may end

    recipe = Recipe.model_validate(content["recipe"])
    result = Path(content["result"])
    try:
        manifest = sft.finetune(recipe, Run.open(Path(content["run"])), _progress)
    except Phi3TrainingError as error:
        if is_main_process():
            write_atomically(result, json.dumps({"error": str(error)}))
        return 1
    if manifest is not None:
        write_atomically(result, json.dumps({"manifest": manifest.as_json()}, default=str))
    return 0


def _progress(done: int, total: int, text: str) -> None:
    if is_main_process():
        sys.stdout.write(json.dumps([done, total, text]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
