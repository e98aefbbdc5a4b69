"""One trial of a search: a run folder of its own that takes chats and base from the whole run.

Writes run/search/trials/trial-NNN/; reads what training logs there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..console import ProgressCallback
from ..errors import StageError
from ..journey import Journey, PlanCheck, do, finished
from ..recipe import Recipe
from ..run import Run
from ..stages import stages_until
from .plan import TRAINING_METRICS

# Told of each held-out loss with its step; ends the trial by raising.
Watch = Callable[[float, int], None]


def trial_journey(whole: Journey, recipe: Recipe, number: int) -> Journey:
    """The journey of trial `number`, with chats and base where its recipe has the same ones."""
    run = Run.open(whole.run.path / "search" / "trials" / f"trial-{number:03d}")
    if recipe.data == whole.recipe.data:
        _take_chats(whole.run, run)
    if (recipe.base, recipe.model) == (whole.recipe.base, whole.recipe.model):
        manifest = whole.run.require("base", "phi3 train")
        place = whole.run.path / str(manifest["path"])  # an absolute path stays what it is
        run.write_manifest("base", {**manifest, "path": str(place)})
    return replace(whole, recipe=recipe, run=run)


def measure(journey: Journey, metric: str, progress: ProgressCallback, watch: Watch) -> float:
    """Train (and evaluate, if the metric needs it) what is not done yet; the metric's value.

    Raises what the stages and `watch` raise, and StageError when there is no such figure.
    """
    stages = stages_until("model" if metric in TRAINING_METRICS else "metrics")
    check = PlanCheck(journey)
    for number, stage in enumerate(stages):
        if finished(journey, stage) is None:
            check.before(stages[number:])
            training = stage.manifest == "model"
            shown = _watched(progress, journey.run, watch) if training else progress
            do(journey, stage, shown)
    value = _figure(journey.run, metric)
    if value is None or not math.isfinite(value):
        raise StageError(f"The trial has no figure {metric} (found: {value}).")
    return value


def drop_weights(folder: Path) -> None:
    """Remove what takes room in a trial that is not the best; its figures and adapter stay."""
    for name in ("model", "finetune/checkpoints"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def _take_chats(whole: Run, run: Run) -> None:
    manifest = whole.require("dataset", "phi3 data prepare")
    for part in manifest["outputs"].values():
        target = run.file(part["path"])
        target.unlink(missing_ok=True)
        try:
            os.link(whole.path / part["path"], target)  # large chats lie on the disk once
        except OSError:
            shutil.copyfile(whole.path / part["path"], target)
    run.write_manifest("dataset", manifest)


def _watched(progress: ProgressCallback, run: Run, watch: Watch) -> ProgressCallback:
    """`progress` that also hands over each new held-out loss that training logs."""
    log = run.path / "finetune" / "eval.jsonl"
    told: set[int] = set()
    size = 0

    def step(done: int, total: int, text: str) -> None:
        nonlocal size
        progress(done, total, text)
        if done == 0 or not log.is_file() or log.stat().st_size == size:
            return
        size = log.stat().st_size
        for line in log.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["step"] <= done and entry["step"] not in told:
                told.add(entry["step"])
                watch(float(entry["loss"]), int(entry["step"]))

    return step


def _figure(run: Run, metric: str) -> float | None:
    part, _, figure = metric.partition(".")
    if not figure:
        found: Any = run.require("model", "phi3 train").get(metric)
    else:
        found = run.require("metrics", "phi3 evaluate")["after"].get(part, {}).get(figure)
    return None if found is None else float(found)
