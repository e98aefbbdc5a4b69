"""A search: its trials, going on after a kill, its report, and the recipe that it leaves."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.integration.small_run import copy_of, make_small_run
from tests.integration.small_search import SEARCH, SETTINGS, TRIALS, journey_of, run_search, start

from phi3_training.cli import main
from phi3_training.errors import StageError, UsageError
from phi3_training.journey import go
from phi3_training.manifests import BaseManifest
from phi3_training.recipe import load_recipe
from phi3_training.stages import stages_until


def without_seconds(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in report["trials"]]


def trained(run: Path) -> dict[str, str]:
    """Which training each trial's model came from."""
    found = sorted(run.glob("search/trials/*/model.json"))
    return {path.parent.name: json.loads(path.read_text())["done_id"] for path in found}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose chats and base are those of the recipe."""
    run = make_small_run(tmp_path_factory.mktemp("search"))
    go(journey_of(run, SETTINGS), stages_until(BaseManifest))
    return run


@pytest.fixture(scope="module")
def found(prepared: Path) -> tuple[Path, dict[str, Any]]:
    run = copy_of(prepared, "uninterrupted")
    return run, run_search(run)


def test_reports_every_trial_and_the_best(found: tuple[Path, dict[str, Any]]) -> None:
    run, report = found
    assert report == json.loads((run / "search" / "report.json").read_text())
    values = [trial["value"] for trial in report["trials"]]
    assert len(values) == TRIALS
    assert len({json.dumps(trial["parameters"]) for trial in report["trials"]}) > 1
    assert report["best"]["value"] == min(values)
    for trial in report["trials"]:
        model = json.loads((run / trial["folder"] / "model.json").read_text())
        assert model["validation_loss"] == trial["value"]
        assert model["settings"]["lora_r"] == trial["parameters"]["finetune.lora_r"]


def test_trials_take_chats_and_base_as_they_are(found: tuple[Path, dict[str, Any]]) -> None:
    run, report = found
    whole = {name: json.loads((run / f"{name}.json").read_text()) for name in ("dataset", "base")}
    for trial in report["trials"]:
        folder = run / trial["folder"]
        for name in ("dataset", "base"):
            assert (
                json.loads((folder / f"{name}.json").read_text())["done_id"]
                == (whole[name]["done_id"])
            )
        assert not (folder / "base").exists()


def test_keeps_the_weights_of_the_best_alone(found: tuple[Path, dict[str, Any]]) -> None:
    run, report = found
    kept = [path.parent.relative_to(run).as_posix() for path in run.glob("search/trials/*/model")]
    assert kept == [report["best"]["folder"]]


def test_the_best_recipe_loads_with_the_best_values(found: tuple[Path, dict[str, Any]]) -> None:
    run, report = found
    best = load_recipe(run / "search" / "best.yaml")
    values = report["best"]["parameters"]
    assert best.finetune.learning_rate == values["finetune.learning_rate"]
    assert best.finetune.lora_r == values["finetune.lora_r"]
    expected = load_recipe(
        run.parent / "recipe.yaml",
        [*SETTINGS, *(f"{key}={value}" for key, value in values.items())],
    )
    assert best == expected.model_copy(update={"name": f"{run.name}-best"})
    written = yaml.safe_load((run / "search" / "best.yaml").read_text())
    assert "serve" not in written


def test_the_picture_shows_every_trial(found: tuple[Path, dict[str, Any]]) -> None:
    run, _ = found
    drawing = ET.parse(run / "search" / "report.svg").getroot()  # noqa: S314 - our own file
    dots = {
        kind: sum(
            element.tag.endswith("use")
            for group in drawing.iter()
            if group.get("id", "").startswith(kind)
            for element in group.iter()
        )
        for kind in ("trials of", "best of")
    }
    assert dots == {"trials of": TRIALS * (1 + 3), "best of": 1 + 3}
    texts = [e.text for e in drawing.iter() if e.tag.endswith("text")]
    assert "finetune.lora_r" in texts
    addresses = [v for e in drawing.iter() for k, v in e.items() if k.endswith("href")]
    assert all(address.startswith("#") for address in addresses)


@pytest.mark.slow
def test_a_killed_search_finds_what_it_would_have_found(
    prepared: Path, found: tuple[Path, dict[str, Any]]
) -> None:
    """Killed in the midst of a trial, twice; no finished trial is trained again."""
    run = copy_of(prepared, "killed")
    for number in (2, TRIALS):
        process = start(run)
        log = run / "search" / "trials" / f"trial-{number:03d}" / "finetune" / "loss.jsonl"
        end = time.monotonic() + 300  # a loaded machine takes its time
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.001)
        process.kill()
        process.wait(30)
        done = trained(run)
        assert f"trial-{number:03d}" not in done
        assert len(done) == number - 1
    report = run_search(run)
    assert without_seconds(report) == without_seconds(found[1])
    assert {name: trained(run)[name] for name in done} == done
    resumed = json.loads((run / f"search/trials/trial-{TRIALS:03d}/model.json").read_text())[
        "choices"
    ]
    assert any("Resumed from checkpoint at step 3" in text for text in resumed)


@pytest.mark.slow
def test_more_trials_continue_an_existing_search(prepared: Path) -> None:
    run = copy_of(prepared, "longer")
    first = run_search(run, SEARCH.replace(f"trials: {TRIALS}", "trials: 2"))
    before = trained(run)
    longer = run_search(run, SEARCH.replace(f"trials: {TRIALS}", "trials: 3"))
    assert without_seconds(longer)[:2] == without_seconds(first)
    assert len(longer["trials"]) == 3
    assert {name: trained(run)[name] for name in before} == before


@pytest.mark.parametrize(
    ("text", "settings", "told"),
    [
        (SEARCH.replace("high: 8", "high: 6"), SETTINGS, "before the search file changed"),
        (SEARCH, [*SETTINGS, "finetune.weight_decay=0.1"], "before the recipe changed"),
        pytest.param(
            SEARCH,
            [*SETTINGS, "data.validation_share=0.2"],
            "before the chats changed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_another_search_is_not_mixed_in(
    text: str, settings: list[str], told: str, found: tuple[Path, dict[str, Any]]
) -> None:
    run = copy_of(found[0], f"other-{told.replace(' ', '-')}")
    run.with_name("recipe.yaml").touch()
    with pytest.raises(UsageError, match=told):
        run_search(run, text, settings)


@pytest.mark.slow
def test_pruned_trials_end_early_and_are_reported(prepared: Path) -> None:
    run = copy_of(prepared, "pruned")
    text = SEARCH.replace("high: 5e-2", "high: 1.0") + "pruning: {startup_trials: 2}\n"
    text = text.replace(f"trials: {TRIALS}", "trials: 7")
    report = run_search(run, text)
    states = [trial["state"] for trial in report["trials"]]
    assert "pruned" in states
    for trial in report["trials"]:
        if trial["state"] == "pruned":
            steps = (run / trial["folder"] / "finetune" / "loss.jsonl").read_text().splitlines()
            assert len(steps) < 14
            assert trial["value"] is None
            assert "pruned after step 7" in trial["remark"]


@pytest.mark.slow
def test_a_failed_trial_is_reported_and_not_retried(prepared: Path) -> None:
    """The label audit refuses rows that are cut; the other trials go on."""
    run = copy_of(prepared, "failed")
    text = SEARCH.replace(f"trials: {TRIALS}", "trials: 4") + (
        "  data.max_length: {type: categorical, choices: [20, 512]}\n"
    )
    report = run_search(run, text)
    failed = [trial for trial in report["trials"] if trial["state"] == "fail"]
    assert 0 < len(failed) < 4
    assert all("cut" in trial["remark"] for trial in failed)
    assert report["best"]["parameters"]["data.max_length"] == 512
    assert without_seconds(run_search(run, text)) == without_seconds(report)


def test_no_figure_at_all_is_an_error(prepared: Path) -> None:
    run = copy_of(prepared, "none")
    text = SEARCH.replace(f"trials: {TRIALS}", "trials: 2") + (
        "  data.max_length: {type: categorical, choices: [20, 21]}\n"
    )
    with pytest.raises(StageError, match="No trial produced a result"):
        run_search(run, text)


@pytest.mark.slow
def test_a_metric_of_the_evaluation(prepared: Path) -> None:
    run = copy_of(prepared, "evaluated")
    text = SEARCH.replace(f"trials: {TRIALS}", "trials: 2").replace(
        "metric: validation_loss\ndirection: minimize",
        "metric: validation.token_f1\ndirection: maximize",
    )
    settings = ["finetune.num_train_epochs=1", "evaluate.max_rows=4", "evaluate.max_new_tokens=8"]
    settings += ["evaluate.canary=[]", "evaluate.probes=[]", "evaluate.resamples=100"]
    report = run_search(run, text, settings)
    values = [trial["value"] for trial in report["trials"]]
    assert report["best"]["value"] == max(values)
    metrics = json.loads((run / report["best"]["folder"] / "metrics.json").read_text())
    assert metrics["after"]["validation"]["token_f1"] == report["best"]["value"]


def test_the_command_shows_a_table_and_where_the_recipe_lies(
    found: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, report = found
    words = ["train", str(run.parent / "recipe.yaml"), "--search", str(run.with_suffix(".yaml"))]
    words += ["--runs", str(run.parent), "--run", run.name, *SETTINGS]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "validation_loss" in shown
    assert f"{report['best']['value']:.5g}" in shown
    assert str(run / "search" / "best.yaml") in shown
    assert main([*words, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def test_a_faulty_search_file_is_wrong_usage(
    found: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "search.yaml").write_text("metric: luck\ntrials: 0\n")
    words = ["train", str(found[0].parent / "recipe.yaml"), "--runs", str(tmp_path)]
    assert main([*words, "--search", str(tmp_path / "search.yaml")]) == 2
    told = capsys.readouterr().err
    assert "metric: 'luck' is unknown" in told
    assert "parameters: is missing" in told
