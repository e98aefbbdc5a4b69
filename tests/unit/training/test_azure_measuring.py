"""The figures that came back with a training job are used; a second job is for what they lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from phi3_training.manifests import MetricsManifest, ModelManifest, Resampling
from phi3_training.recipe import Recipe
from phi3_training.run import Run
from phi3_training.targets.azure.command_job import stage_inputs
from phi3_training.targets.azure.train import evaluate

from .azure_wire import run_with_chats


class NoAzure:
    """Nothing may be asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"Azure was asked for {name}")


def figures(job: str, asked: str) -> MetricsManifest:
    return MetricsManifest(
        target="azure",
        before={},
        after={},
        comparisons={},
        rows="evaluate/rows.jsonl",
        settings=Resampling(confidence=0.95, resamples=100, seed=1),
        asked=asked,
        job=job,
    )


def test_retraining_brings_its_figures_and_needs_no_second_job(tmp_path: Path) -> None:
    run = run_with_chats(tmp_path)
    content = {"name": "x", "model": {"name_or_path": "o/m"}, "data": {"train": ["x"]}}
    recipe = Recipe.model_validate(content)
    questions = stage_inputs(recipe, run).questions
    run.write(figures("first-job", questions))  # of the stage, before it trained again
    run.write(ModelManifest(path=".", job="second-job"))
    run.file("evaluate", "rows.jsonl").write_text("{}\n")
    (run.path / "azure" / "train").mkdir(parents=True)
    Run(run.path / "azure" / "train").write(figures("second-job", questions))

    metrics = evaluate(NoAzure(), recipe, run, lambda *_: None)  # type: ignore[arg-type]

    assert metrics.job == "second-job"
