"""What goes up with a job, the same each time; what the job makes of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from phi3_training.errors import StageError
from phi3_training.manifests import DatasetManifest
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run
from phi3_training.targets.azure import in_job
from phi3_training.targets.azure.command_job import content_hash, stage_code, stage_inputs
from phi3_training.targets.azure.environments import (
    MODEL_PACKAGES,
    job_conda_file,
    pinned,
    serving_environment,
)

ROOT = Path(__file__).resolve().parents[3]
RECIPE = """\
name: mine
model: {name_or_path: tiny}
base: {data: base.jsonl}
data: {train: chats.jsonl}
evaluate: {canary: canary.jsonl}
azure: {subscription_id: 00000000-1111-2222-3333-444444444444}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name in ("base", "chats", "canary"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"messages": [], "id": "{name}"}}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "run")
    run.write(DatasetManifest(outputs={}))
    for part in ("train", "validation"):
        run.file("data", f"{part}.jsonl").write_text(f'{{"messages": [], "id": "{part}"}}\n')
    return run


def test_the_job_reads_the_same_recipe_from_its_own_folder(
    recipe: Recipe, run: Run, tmp_path: Path
) -> None:
    staged = stage_inputs(recipe, run, processes=4)
    moved, there = tmp_path / "elsewhere", tmp_path / "apart" / "recipe.json"
    shutil.copytree(staged.data, moved)
    there.parent.mkdir()
    shutil.copyfile(staged.recipe, there)
    found = in_job.read_recipe(there, moved)
    assert found.finetune.num_processes == 4
    assert found.finetune.learning_rate == recipe.finetune.learning_rate
    assert found.base is not None
    assert [path.read_text() for path in found.base.data] == ['{"messages": [], "id": "base"}\n']
    assert found.evaluate.canary is not None
    assert all(path.is_file() and moved in path.parents for path in found.evaluate.canary)
    text = there.read_text()
    assert "00000000-1111" not in text
    assert str(tmp_path) not in text


def test_the_same_content_is_the_same_upload(recipe: Recipe, run: Run) -> None:
    def uploaded() -> str:
        return content_hash(stage_inputs(recipe, run).data, "*/*")

    first = uploaded()
    assert uploaded() == first
    run.file("data", "train.jsonl").write_text('{"messages": [], "id": "other"}\n')
    assert uploaded() != first


def test_another_learning_rate_sends_no_chats_again(recipe: Recipe, run: Run) -> None:
    first = content_hash(stage_inputs(recipe, run).data, "*/*")
    section = recipe.finetune.model_copy(update={"learning_rate": 0.5})
    again = stage_inputs(recipe.model_copy(update={"finetune": section}), run)
    assert content_hash(again.data, "*/*") == first
    assert '"learning_rate": 0.5' in again.recipe.read_text()


def test_other_questions_are_no_other_training(recipe: Recipe, run: Run) -> None:
    before = stage_inputs(recipe, run)
    section = recipe.evaluate.model_copy(update={"max_rows": 7})
    after = stage_inputs(recipe.model_copy(update={"evaluate": section}), run)
    assert after.training_data == before.training_data
    assert after.questions != before.questions


def test_the_code_is_of_both_packages_and_nothing_compiled(run: Run) -> None:
    folder = stage_code(run)
    assert (folder / "phi3_training" / "targets" / "azure" / "in_job.py").is_file()
    assert (folder / "phi3_tool" / "client.py").is_file()
    assert not [path for path in folder.rglob("*") if path.suffix == ".pyc"]


def test_every_pin_is_one_that_was_tested(recipe: Recipe, run: Run) -> None:
    lock = (ROOT / "constraints" / "azure.txt").read_text().splitlines()
    tested = {_plain(line) for line in lock if "==" in line}
    path, version = job_conda_file(recipe, run)
    pins = re.findall(r"- (\S+==\S+)$", path.read_text(), re.MULTILINE)
    assert len(pins) > 100
    assert {_plain(pin) for pin in pins} <= tested
    assert {"torch", "transformers", "trl", "peft", "mlflow", "uvicorn"} <= {
        pin.split("==")[0] for pin in pins
    }
    assert job_conda_file(recipe, run)[1] == version
    qlora = recipe.finetune.model_copy(update={"method": "qlora"})
    other, changed = job_conda_file(recipe.model_copy(update={"finetune": qlora}), run)
    assert changed != version
    assert "bitsandbytes" in other.read_text()


def test_a_model_is_served_by_the_versions_that_trained_it(recipe: Recipe, run: Run) -> None:
    pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
    trained = job_conda_file(recipe, run)[0].read_text()
    served = str(serving_environment(recipe.azure).conda_file)
    for pin in pinned(*MODEL_PACKAGES):
        assert f"- {pin}\n" in trained
        assert f"'{pin}'" in served


def _plain(pin: str) -> str:
    name, version = pin.split("==")[:2]
    return f"{re.sub('[-_.]+', '-', name).lower()}=={version.split(';')[0].strip()}"


def _files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(f"{folder.name}/{name}")
    return folder


def test_weights_of_a_folder_an_mlflow_model_and_a_catalogue_model(tmp_path: Path) -> None:
    whole = ("config.json", "model.safetensors", "tokenizer.json")
    plain = _files(tmp_path / "plain", *whole)
    assert in_job.weights_in(plain, tmp_path / "w1") == plain
    inner = _files(tmp_path / "mlflow" / "artifacts" / "model", *whole)
    assert in_job.weights_in(tmp_path / "mlflow", tmp_path / "w2") == inner
    _files(tmp_path / "apart" / "data" / "model", *whole[:2])
    _files(tmp_path / "apart" / "data" / "tokenizer", "tokenizer.json", "config.json")
    both = in_job.weights_in(tmp_path / "apart", tmp_path / "w3")
    assert {path.name for path in both.iterdir()} == set(whole)
    assert (both / "config.json").read_text() == "model/config.json"


def test_a_model_without_weights_or_tokenizer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no weights"):
        in_job.weights_in(_files(tmp_path / "a", "config.json"), tmp_path / "w")
    bare = _files(tmp_path / "b", "config.json", "model.safetensors")
    with pytest.raises(StageError, match="no tokenizer"):
        in_job.weights_in(bare, tmp_path / "w")


def test_a_fault_inside_the_job_is_one_line_for_the_one_who_waits(
    recipe: Recipe, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staged = stage_inputs(recipe, run)
    bare = _files(tmp_path / "tuned", "config.json")
    words = ["evaluate", "--data", str(staged.data), "--recipe", str(staged.recipe)]
    words += ["--tuned", str(bare), "--base", str(bare)]
    assert in_job.main([*words, "--run-output", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "no weights" in json.loads(last.removeprefix(in_job.ERROR))
