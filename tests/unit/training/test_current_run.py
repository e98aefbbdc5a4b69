"""One current run: what the commands work on, what is never replaced, what is said of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from phi3_training.cli import main
from phi3_training.commands.common import journey_of, recipe_of
from phi3_training.errors import UsageError
from phi3_training.flow.store import own_name
from phi3_training.manifests import (
    DatasetManifest,
    EndpointManifest,
    GatePassage,
    ModelManifest,
    PlaceManifest,
)
from phi3_training.recipe import save_recipe
from phi3_training.run import RECIPE_FILE, Run
from phi3_training.runs import all_runs, current_of, make_current, remarks

from .test_where_to_run import options

CHAT = {
    "messages": [
        {"role": "user", "content": "Do you repair tents?"},
        {"role": "assistant", "content": "We do."},
    ]
}


def trained(runs: Path, name: str, chats: Path) -> Run:
    run = Run.open(runs / name)
    chats.write_text(json.dumps({**CHAT, "name": name}) + "\n", encoding="utf-8")
    words = ["tiny", f"data.train={chats}", "data.validation=[]"]
    save_recipe(recipe_of(words), run.file(RECIPE_FILE))
    run.write(DatasetManifest(outputs={}))
    run.write(ModelManifest(path="model", done_id="1"))
    return run


def test_the_chosen_run_stays_current_whatever_is_worked_on_later(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    first = trained(runs, "shop", tmp_path / "a.jsonl")
    make_current(first)
    trained(runs, "kettle", tmp_path / "b.jsonl")

    assert [run.name for run in all_runs(runs)] == ["shop", "kettle"]
    assert main(["use", "kettle", "--runs", str(runs)]) == 0
    assert [run.name for run in all_runs(runs)] == ["kettle", "shop"]

    shutil.rmtree(runs / "kettle")
    current = current_of(runs)
    assert current is not None
    assert current.name == "shop"


def test_a_command_without_a_recipe_means_the_current_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_current(trained(runs, "kettle", tmp_path / "b.jsonl"))
    trained(runs, "shop", tmp_path / "a.jsonl")

    journey = journey_of(options(runs, words=["connection.dialect=openai"]))

    assert journey.run.name == "kettle"
    assert journey.recipe.data.train == [tmp_path / "b.jsonl"]


def test_a_current_run_on_azure_is_not_continued_unasked(tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", "cloud", tmp_path / "a.jsonl")
    run.write(PlaceManifest(target="azure"))
    make_current(run)

    with pytest.raises(UsageError, match="add --on azure"):
        journey_of(options(tmp_path / "runs"))


def test_a_run_of_other_chats_is_not_replaced_unasked(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    trained(runs, "shop", tmp_path / "a.jsonl")
    other = tmp_path / "b.jsonl"
    other.write_text(json.dumps(CHAT) + "\n", encoding="utf-8")
    words = ["tiny", f"data.train={other}", "data.validation=[]"]

    with pytest.raises(UsageError, match=r"a\.jsonl.*--run NAME.*--replace"):
        journey_of(options(runs, words=words, run="shop"))

    assert journey_of(options(runs, words=words, run="shop", replace=True)).run.name == "shop"
    adapter = [*words, "finetune.adapter=shy"]
    assert journey_of(options(runs, words=adapter, run="shop")).run.name == "shop"


def test_edited_chats_continue_their_run(tmp_path: Path) -> None:
    trained(tmp_path / "runs", "shop", tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(CHAT) + "\n")
    words = ["tiny", f"data.train={tmp_path / 'a.jsonl'}", "data.validation=[]"]

    assert journey_of(options(tmp_path / "runs", words=words, run="shop")).run.name == "shop"


def test_what_is_served_is_compared_with_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "runs", "shop", tmp_path / "a.jsonl")
    forced = GatePassage(passed=False, forced=True, failed=["min_gain"])
    run.write(EndpointManifest(endpoint="http://127.0.0.1:1/score", of="1", gate=forced))
    assert ["did not pass" in remark for remark in remarks(run)] == [True]

    run.write(ModelManifest(path="model", done_id="2"))
    assert "earlier model" in remarks(run)[1]
    assert main(["status", "--runs", str(tmp_path / "runs")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "shop (current)" in shown
    assert "note: the endpoint serves an earlier model" in shown


def test_runs_are_listed_and_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    trained(runs, "shop", tmp_path / "a.jsonl")
    make_current(trained(runs, "kettle", tmp_path / "b.jsonl"))

    assert main(["runs", "-o", "json", "--runs", str(runs)]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["current"]) for row in listed] == [("kettle", True), ("shop", False)]

    assert main(["rm", "kettle", "--runs", str(runs)]) == 2  # nobody can say yes
    assert main(["rm", "kettle", "--yes", "--runs", str(runs)]) == 0
    assert not (runs / "kettle").exists()
    assert "The current run is now shop" in capsys.readouterr().out


def test_an_azure_run_with_an_endpoint_is_not_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "runs", "cloud", tmp_path / "a.jsonl")
    run.write(PlaceManifest(target="azure"))
    run.write(EndpointManifest(target="azure", endpoint="https://x.example/score"))

    assert main(["rm", "cloud", "--yes", "--runs", str(tmp_path / "runs")]) == 1
    assert "phi3 down --on azure cloud" in capsys.readouterr().err
    assert run.path.is_dir()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["statsu"], "'status'"),
        (["up", "--forse"], "'--force'"),
        (["data", "chek"], "'check'"),
        (["up", "phi3-tyni"], "'phi3-tiny'"),
        (["use", "shpo"], "'shop'"),
    ],
)
def test_the_closest_word_is_named(
    typed: list[str],
    meant: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PHI3_RUNS", str(tmp_path / "runs"))
    trained(tmp_path / "runs", "shop", tmp_path / "a.jsonl")
    try:
        status = main(typed)
    except SystemExit as ended:
        status = int(str(ended.code))

    assert status == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_own_connections_of_long_names_stay_apart() -> None:
    assert own_name("phi3_connection", "shop") == "phi3_connection_shop"
    one, two = (own_name("phi3_connection", "x" * 63 + end) for end in "ab")
    assert one != two
    assert len(one) == len(two) == 64
