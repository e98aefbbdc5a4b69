"""--on, --run and --rehearse: which target, which run folder, which command line inside."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from phi3_training.cli import main
from phi3_training.commands.common import run_name, where_to_run
from phi3_training.commands.rehearse import inner_words
from phi3_training.journey import Journey, Stage, do, go
from phi3_training.manifests import (
    BaseManifest,
    DatasetManifest,
    EndpointManifest,
    Manifest,
    MetricsManifest,
    ModelManifest,
    PlaceManifest,
    ProvisionManifest,
    Resampling,
)
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run
from phi3_training.stages import STAGES, stages_of, stages_until
from phi3_training.targets import Target


def azure_run(runs: Path, name: str = "cloud-azure") -> Run:
    run = Run.open(runs / name)
    run.write(PlaceManifest(target="azure"))
    return run


def options(runs: Path, **given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"runs": runs, "on": None, "run": None, "words": [], **given})


def test_a_runs_place_is_remembered(tmp_path: Path) -> None:
    azure_run(tmp_path)
    assert where_to_run(options(tmp_path)) == "local"
    assert where_to_run(options(tmp_path, run="cloud-azure")) == "azure"
    assert where_to_run(options(tmp_path, run="new")) == "local"
    assert where_to_run(options(tmp_path, run="cloud-azure", on="local")) == "local"


def test_a_run_on_azure_has_a_name_of_its_own() -> None:
    recipe = Recipe.model_construct(name="phi3-tiny")
    assert run_name(recipe, "local") == "phi3-tiny"
    assert run_name(recipe, "azure") == "phi3-tiny-azure"
    assert run_name(Recipe.model_construct(name="x-azure"), "azure") == "x-azure"
    assert len(run_name(Recipe.model_construct(name="x" * 64), "azure")) == 64


@pytest.mark.patient
def test_a_run_does_not_change_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    azure_run(tmp_path, "mine")
    assert main(["up", "--on", "local", "--run", "mine", "--runs", str(tmp_path)]) == 2
    assert "was created on azure" in capsys.readouterr().err


def test_the_stages_of_both_targets() -> None:
    here = [stage.title for stage in stages_of(in_cloud=False)]
    there = [stage.title for stage in stages_of(in_cloud=True)]
    assert [title for title in there if title != "provision"] == here
    assert there[:3] == ["prepare", "provision", "base"]
    assert [stage.title for stage in stages_until(DatasetManifest, in_cloud=True)] == ["prepare"]


@pytest.mark.parametrize(
    ("typed", "given", "inside"),
    [
        (["up", "--on", "azure", "--rehearse"], {"on": "azure"}, "up RECIPE --on azure RUNS"),
        (["up", "a.yaml", "--rehearse"], {"words": ["a.yaml"]}, "up a.yaml RUNS --on azure"),
        (["up", "--rehearse", "k.l=2"], {"words": ["k.l=2"]}, "up RECIPE k.l=2 RUNS --on azure"),
        (["up", "--run", "r", "--rehearse"], {"run": "r"}, "up --run r RUNS"),
        (["azure", "provision", "--rehearse"], {"on": "azure"}, "azure provision RECIPE RUNS"),
    ],
)
def test_the_command_inside_a_rehearsal(
    tmp_path: Path, typed: list[str], given: dict[str, object], inside: str
) -> None:
    words = inner_words(options(tmp_path, **given), typed, tmp_path / "inner")

    shown = ["RECIPE" if word.endswith("phi3-tiny-azure.yaml") else word for word in words]
    assert " ".join(shown).replace(f"--runs {tmp_path / 'inner'}", "RUNS") == inside


def test_the_rehearsals_own_runs_folder_replaces_the_users(tmp_path: Path) -> None:
    for typed in (["down", "--runs", "x", "--rehearse"], ["down", "--runs=x", "--rehearse"]):
        given = argparse.Namespace(runs=tmp_path, on=None, run=None, named=None)
        words = inner_words(given, typed, tmp_path / "inner")
        assert words == ["down", "--runs", str(tmp_path / "inner"), "--on", "azure"]


def test_status_and_down_leave_azure_alone_until_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = azure_run(tmp_path)
    run.write(EndpointManifest(target="azure", endpoint="https://x.example/score"))

    assert main(["status", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "endpoint: not asked https://x.example/score" in shown
    assert "phi3 status --on azure --run cloud-azure" in shown

    assert main(["down", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Nothing of ours is running." in shown
    assert "cloud-azure is on Azure and may be billing: phi3 down --on azure cloud-azure" in shown


def test_down_words_for_azure_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run.open(tmp_path / "here").write(DatasetManifest(outputs={}))
    assert main(["down", "here", "--all", "--runs", str(tmp_path)]) == 2
    assert "is for runs on Azure" in capsys.readouterr().err


class _Cloud:
    """An Azure whose cluster is gone, after `down`; what it was asked to provide."""

    def __init__(self) -> None:
        self.provided: list[bool] = []

    @property
    def cloud(self) -> _Cloud:
        return self

    def inputs(self, _recipe: Recipe, _stage: type[Manifest], shared: object) -> object:
        """Nothing of a place counts here."""
        return shared

    def is_provided(self, _recipe: Recipe, _run: Run, *, trains: bool) -> bool:
        return not trains

    def provide(
        self, _recipe: Recipe, _run: Run, _progress: object, *, trains: bool
    ) -> ProvisionManifest:
        self.provided.append(trains)
        return ProvisionManifest(summary="made")


DONE: dict[type[Manifest], Manifest] = {
    DatasetManifest: DatasetManifest(outputs={}),
    BaseManifest: BaseManifest(target="azure", path="."),
    ModelManifest: ModelManifest(target="azure", path="."),
    MetricsManifest: MetricsManifest(
        before={},
        after={},
        comparisons={},
        rows="rows",
        settings=Resampling(confidence=0.95, resamples=100, seed=1),
    ),
}


def _finish(journey: Journey, stage: Stage[Any]) -> None:
    do(journey, replace(stage, work=lambda _journey: DONE[stage.manifest]), lambda *_told: None)


@pytest.mark.parametrize("again", [BaseManifest, ModelManifest, MetricsManifest])
def test_a_stage_that_is_done_again_gets_its_cluster_back(
    tmp_path: Path, again: type[Manifest]
) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "recipe.yaml").write_text(
        "name: mine\nmodel: {name_or_path: tiny}\nbase: {data: chats.jsonl}\n"
        "data: {train: chats.jsonl}\nevaluate: {canary: [], probes: []}\n"
    )
    run = Run.open(tmp_path / "run")
    run.file("rows").touch()
    recipe = load_recipe(tmp_path / "recipe.yaml")
    cloud = _Cloud()
    journey = Journey(recipe, run, cast(Target, cloud), tmp_path)
    (provision,) = (stage for stage in STAGES if stage.manifest is ProvisionManifest)
    for stage in STAGES:
        if stage.manifest in DONE:
            _finish(journey, stage)

    go(journey, [provision])
    assert cloud.provided == [False]
    go(journey, [provision])
    assert cloud.provided == [False]
    go(journey, [provision], again=frozenset([again]))
    assert cloud.provided == [False, True]
