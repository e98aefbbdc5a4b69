"""Several processes: the command that starts them, and two that train together on this CPU."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import forked
from tests.integration.finetune_fixture import loss_log, make_base, make_recipe, make_run

from phi3_training.errors import RecipeError, StageError
from phi3_training.finetune import finetune
from phi3_training.finetune.launch import WORKER, command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


def test_two_processes_take_the_steps_of_one(base: Path, tmp_path: Path) -> None:
    """One step over all rows: each process has half of them."""
    one_recipe = make_recipe(tmp_path / "one", base, "finetune.num_train_epochs=1")
    one_run = make_run(tmp_path / "one", one_recipe)
    one = finetune(one_recipe, one_run)
    two_recipe = make_recipe(
        tmp_path / "two",
        base,
        "finetune.num_train_epochs=1",
        "finetune.num_processes=2",
        "finetune.per_device_train_batch_size=4",
    )
    two_run = make_run(tmp_path / "two", two_recipe)
    seen: list[tuple[int, int]] = []
    with forked.forked_modules():
        two = finetune(two_recipe, two_run, lambda done, total, _text: seen.append((done, total)))
    assert (1, 1) in seen
    assert two.steps == one.steps == len(loss_log(two_run)) == 1
    assert two.first_loss == pytest.approx(one.first_loss, abs=1e-4)
    alone = load_file(one_run.path / "adapter" / "adapter_model.safetensors")
    shared = load_file(two_run.path / "adapter" / "adapter_model.safetensors")
    for name, weight in alone.items():
        assert torch.allclose(weight, shared[name], atol=2e-5), name


@pytest.mark.slow
def test_the_error_that_stops_the_processes_is_reported(base: Path, tmp_path: Path) -> None:
    options = ("finetune.num_processes=2", "finetune.target_modules=[no_such_layer]")
    recipe = make_recipe(tmp_path, base, *options)
    with pytest.raises(StageError, match=r"(?s)do not fit the model.*no_such_layer"):
        finetune(recipe, make_run(tmp_path, recipe))


def test_gpus_are_started_by_accelerate(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        base,
        "finetune.num_processes=16",
        "finetune.num_machines=2",
        "finetune.machine_rank=1",
        "finetune.main_process_ip=10.0.0.5",
        "finetune.main_process_port=29501",
    )
    words = command(recipe.finetune, "cuda", Path("plan.json"))
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    given = dict(pairwise(words))
    assert given["--num_processes"] == "16"
    assert given["--num_machines"] == "2"
    assert given["--machine_rank"] == "1"
    assert given["--main_process_ip"] == "10.0.0.5"
    assert given["--main_process_port"] == "29501"
    assert words[-3:] == ["--module", WORKER, "plan.json"]
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(words[3:])
    assert (parsed.num_processes, parsed.multi_gpu, parsed.training_script) == (16, True, WORKER)


def test_cpus_are_started_by_torchrun(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, base, "finetune.num_processes=2")
    words = command(recipe.finetune, "cpu", Path("plan.json"))
    assert words[2] == "torch.distributed.run"
    assert words[words.index("--nproc-per-node") + 1] == "2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["finetune.num_machines=2"], "multiple of num_machines"),
        (["finetune.num_processes=2", "finetune.num_machines=2"], "main_process_ip"),
        (["finetune.machine_rank=1"], "counts from 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    base: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(tmp_path, base, *options)
