"""Provision and train against the rehearsed Azure, through the unmodified SDKs, with faults."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")


import phi3_rehearsal as rehearsal
from phi3_rehearsal.faults import Faults
from phi3_training.cli import main
from phi3_training.data import prepare
from phi3_training.errors import StageError
from phi3_training.recipe import Recipe, load_recipe
from phi3_training.run import Run
from phi3_training.targets.azure import jobs, train
from phi3_training.targets.azure.clients import Clients
from phi3_training.targets.azure.command_job import send
from phi3_training.targets.azure.place import find_place, settle
from phi3_training.targets.azure.provision import Step, is_provisioned, provision
from phi3_training.targets.azure.resources import VAULT, ensure_dependents

from .. import forked
from ..component_inputs import INPUTS
from .small_run import SMALL

POLLS = ("azure.poll.interval=0.2", "azure.poll.job_interval=0.3", "evaluate.max_rows=4")
LIMIT = 240.0


def _quiet(_done: int, _total: int, _text: str) -> None:
    """No display."""


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rehearsal.Rehearsal]:
    """A rehearsed Azure, and this process inside it."""
    with forked.forked_modules():
        made = rehearsal.start(tmp_path_factory.mktemp("azure") / "rehearsal")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.env.items():
            patch.setenv(name, value)
        yield made
        made.close()


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What does {word} number {size} cost?"},
                {"role": "assistant", "content": f"It is {size * 3} euros"},
            ]
        }
        for size in range(1, 6)
        for word in ("lamp", "boat", "stove", "tent")
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "recipe.yaml").write_text(SMALL.replace("num_train_epochs: 8", "num_train_epochs: 1"))
    return folder / "recipe.yaml"


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file, POLLS)


def _clients(recipe: Recipe, folder: Path) -> Clients:
    return Clients(find_place(recipe.azure, os.environ, folder), recipe.azure.poll)


def _prepared(recipe: Recipe, path: Path) -> Run:
    run = Run.open(path)
    run.write(prepare(recipe.data, run))
    return run


@pytest.fixture(scope="module")
def provisioned(
    azure: rehearsal.Rehearsal, recipe_file: Path
) -> tuple[list[Step], list[Step], list[dict[str, Any]]]:
    """The steps of the first and of the second time, and the first time's calls.

    The first time meets faults: each passes, and nothing may be made twice for it.
    """
    recipe = load_recipe(recipe_file, POLLS)
    for fault in (
        "PUT */storageAccounts/* reset-after",
        "PUT */vaults/* 409",
        "PUT */userAssignedIdentities/* 500",
        "PUT */roleAssignments/* reset",
        "PUT */computes/* 429 retry-after=0",
        "GET */usages 503",
    ):
        azure.fault(fault)
    first: list[Step] = []
    second: list[Step] = []
    provision(_clients(recipe, recipe_file.parent), recipe, _quiet, first.append)
    calls = azure.calls()
    provision(_clients(recipe, recipe_file.parent), recipe, _quiet, second.append)
    return first, second, calls


def test_all_is_made_once_whatever_passes_by(
    provisioned: tuple[list[Step], list[Step], list[dict[str, Any]]],
) -> None:
    first, second, calls = provisioned
    made = {step.what for step in first}
    assert made >= {"resource group", "storage account", "key vault", "container registry"}
    assert made >= {"workspace", "identity", "hub", "project", "role", "cluster"}
    assert {step.state for step in first} <= {"created", "exists"}
    assert {step.state for step in second} == {"exists"}
    named = [call["path"] for call in calls if call["method"] == "PUT" and call["status"] == 201]
    assert len(named) == len(set(named))  # nothing was made under a second name
    assert sum("/storageAccounts/" in path for path in set(named)) == 1


def test_the_second_time_sends_nothing_that_changes(
    provisioned: object, azure: rehearsal.Rehearsal, recipe: Recipe, tmp_path: Path
) -> None:
    before = len(azure.calls())
    clients = _clients(recipe, tmp_path)
    provision(clients, recipe, _quiet)
    assert is_provisioned(clients, recipe.azure)
    asked = {c["method"] for c in azure.calls()[before:] if c["host"] == "management.azure.com"}
    assert asked == {"GET"}


def test_too_little_quota_stops_before_anything_is_made(
    azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    words = ["azure.resource_group=elsewhere", "azure.compute.max_instances=90"]
    recipe = load_recipe(recipe_file, [*POLLS, *words])
    before = len(azure.calls())
    with pytest.raises(StageError, match="phi3 azure quota --request"):
        provision(_clients(recipe, tmp_path), recipe, _quiet)
    assert not [c for c in azure.calls()[before:] if c["method"] == "PUT"]


def test_a_lasting_refusal_is_reported_once_with_every_failed_step(
    azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [*POLLS, "azure.resource_group=refused"])
    azure.fault("PUT */resourceGroups/refused/*/vaults/* 403")
    steps: list[Step] = []
    with pytest.raises(StageError, match="AuthorizationFailed"):
        provision(_clients(recipe, tmp_path), recipe, _quiet, steps.append)
    states = {step.what: step.state for step in steps}
    assert states["key vault"] == "failed"
    assert states["storage account"] == "created"
    assert "workspace" not in states


def test_a_poll_that_finds_nothing_makes_nothing_twice(
    azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [*POLLS, "azure.resource_group=lostpoll"])
    azure.fault("GET */operationsStatus/* lost")
    before, steps = len(azure.calls()), list[Step]()
    provision(_clients(recipe, tmp_path), recipe, _quiet, steps.append)
    assert {step.state for step in steps} <= {"created", "exists"}
    calls = azure.calls()[before:]
    lost = [c for c in calls if "/operationsStatus/" in c["path"] and c["status"] == 404]
    assert len(lost) == 1
    made = [c["path"] for c in calls if (c["method"], c["status"]) == ("PUT", 201)]
    assert len(made) == len(set(made))
    put = {c["path"] for c in calls if c["method"] == "PUT"}
    for kind in ("storageAccounts", "vaults", "registries", "computes"):
        assert len([path for path in put if path.split("/")[-2] == kind]) == 1, kind


def test_the_hub_waits_for_no_workspace_and_the_upload_for_no_cluster(
    azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    names = ["azure.resource_group=beside", "azure.workspace_name=beside"]
    recipe = load_recipe(recipe_file, [*POLLS, *names])
    run, clients = _prepared(recipe, tmp_path / "beside"), _clients(recipe, tmp_path)
    azure.fault("PUT */Microsoft.Resources/deployments/beside-[0-9]* slow seconds=1")
    azure.fault("* */workspaces/beside/computes/* slow seconds=4")
    before = len(azure.calls())
    provision(clients, recipe, _quiet, ahead=partial(train.send_ahead, clients, recipe, run))
    calls = azure.calls()[before:]
    put = {call["path"]: call["time"] for call in calls if call["method"] == "PUT"}

    def when(pattern: str) -> float:
        return next(time for path, time in put.items() if re.search(pattern, path))

    cluster = when("/workspaces/beside/computes/")
    assert when("/Microsoft.Resources/deployments/beside-hub-") < cluster
    assert when(r"/data/data/train\.jsonl$")
    assert when("/codes/phi3-code/versions/")
    to_storage = (call["time"] for call in calls if ".blob." in call["host"])
    polls = (call["time"] for call in calls if "/operationsStatus/" in call["path"])
    assert min(to_storage) < max(polls)  # the last one finds the cluster made
    before = len(azure.calls())
    sent = send(clients, recipe, run, 1, _quiet)  # what the submission finds
    assert sent.code.endswith(next(p for p in put if "/codes/" in p).rpartition("/")[2])
    assert not [call for call in azure.calls()[before:] if call["method"] == "PUT"]


def test_a_cluster_without_quota_is_reported_by_its_code(
    azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [*POLLS, "azure.resource_group=noquota"])
    azure.fault("* */computes/* quota")
    steps: list[Step] = []
    with pytest.raises(StageError, match="OutOfQuota"):
        provision(_clients(recipe, tmp_path), recipe, _quiet, steps.append)
    assert [step.what for step in steps if step.state == "failed"] == ["cluster"]


def test_with_least_privilege_nobody_becomes_a_contributor(
    azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    words = ["azure.resource_group=least", "azure.least_privilege=true"]
    recipe = load_recipe(recipe_file, [*POLLS, *words])
    clients = _clients(recipe, tmp_path)
    steps: list[Step] = []
    provision(clients, recipe, _quiet, steps.append)
    roles = [step.name for step in steps if step.what == "role"]
    assert roles
    assert not [name for name in roles if name.startswith("Contributor")]
    assert is_provisioned(clients, recipe.azure)


def test_a_deleted_key_vault_that_keeps_its_name_is_taken_back(
    azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [*POLLS, "azure.resource_group=deleted"])
    clients = _clients(recipe, tmp_path)
    place = clients.place
    states: list[dict[str, str]] = []
    clients.resources.resource_groups.create_or_update("deleted", {"location": "eastus"})
    for _ in range(2):
        states.append({})

        def step(what: str, _name: str, work: Callable[[], str]) -> bool:
            states[-1][what] = work()
            return True

        assert ensure_dependents(clients, {}, _quiet, step) is not None
        resources = clients.resources.resources
        resources.begin_delete_by_id(VAULT.id(place), api_version=VAULT.api_version).wait()
    assert states[0]["key vault"] == "created"
    assert states[1] == {**dict.fromkeys(states[0], "exists"), "key vault": "created"}


@pytest.mark.slow
def test_killed_while_it_trains_the_same_job_is_resumed(
    provisioned: object, azure: rehearsal.Rehearsal, recipe: Recipe, tmp_path: Path
) -> None:
    run = _prepared(recipe, tmp_path / "killed")
    script = (
        "import os, sys; from pathlib import Path\n"
        "from phi3_training.recipe import load_recipe; from phi3_training.run import Run\n"
        "from phi3_training.targets.azure import train\n"
        "from phi3_training.targets.azure.clients import Clients\n"
        "from phi3_training.targets.azure.place import find_place\n"
        "recipe = load_recipe(Path(sys.argv[1]), sys.argv[3:]); run = Run(Path(sys.argv[2]))\n"
        "place = find_place(recipe.azure, os.environ, run.path)\n"
        "clients = Clients(place, recipe.azure.poll)\n"
        "train.finetune(clients, recipe, run, lambda d, t, s: None)\n"
    )
    words = [str(recipe.data.train[0].parent / "recipe.yaml"), str(run.path), *POLLS]
    process = subprocess.Popen([sys.executable, "-c", script, *words])
    try:
        _until(lambda: _puts(azure, run) == 1, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    name = jobs.recorded_jobs(run)["train"].name
    manifest = train.finetune(_clients(recipe, tmp_path), recipe, run, _quiet)
    run.write(manifest)
    assert manifest.job == name
    assert _puts(azure, run) == 1
    assert manifest.route == "job"
    assert manifest.model_output == f"azureml://jobs/{name}/outputs/model"
    assert "tiny is not in Azure's catalogue" in " ".join(manifest.choices)
    metrics = train.evaluate(_clients(recipe, tmp_path), recipe, run, _quiet)
    assert metrics.job == name  # measured where it was trained: no second job
    assert (run.path / metrics.rows).is_file()
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
    assert (run.path / manifest.loss_log).is_file()
    assert metrics.after["validation"]["rows"] > 0
    store: Any = _clients(recipe, tmp_path).ml.datastores.get(
        "workspaceblobstore", include_secrets=True
    )
    secret = store.credentials
    planted = [azure.env["AZURE_CLIENT_SECRET"]]
    planted += [
        value for name in ("account_key", "sas_token") if (value := getattr(secret, name, None))
    ]
    assert len(planted) > 1
    _no_secret_in(run, planted)


def _puts(azure: rehearsal.Rehearsal, run: Run) -> int:
    """How many times the run's training job was made."""
    ticket = jobs.recorded_jobs(run).get("train")
    return sum(
        call["method"] == "PUT"
        and call["status"] == 201
        and f"/jobs/phi3-train-{run.name}" in call["path"]
        for call in azure.calls()
        if ticket is not None
    )


def _until(reached: Any, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + LIMIT
    while not reached():
        assert process.poll() is None, "it ended before it was to be killed"
        assert time.monotonic() < ends, "the job was not submitted in time"
        time.sleep(0.1)


def _no_secret_in(run: Run, planted: list[str]) -> None:
    """Neither the sign-in's secret nor the storage's key is in a file of the run folder."""
    for path in run.path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [secret for secret in planted if secret.encode() in content], path
            assert b"sig=" not in content or path.suffix == ".py", path


def test_a_pipeline_is_sent_what_the_component_takes_and_its_failure_is_reported(
    provisioned: object, azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    words = [
        "azure.train.route=pipeline",
        # Its defaults hold learning_rate_min and _max, which the component does not take.
        "azure.train.foundation_model={name: Phi-4-mini-instruct, version: 1}",
    ]
    recipe = load_recipe(recipe_file, [*POLLS, *words])
    run = _prepared(recipe, tmp_path / "piped")
    for fault in (
        "GET */components/* 500",
        "POST */listSecrets reset",
        "PUT */jobs/phi3-train-piped* reset-after",
        "GET */jobs/phi3-train-piped* 503",
    ):
        azure.fault(fault)
    azure.fault("* */jobs/phi3-train-piped* failed code=UserError message='out of memory'")
    with pytest.raises(StageError, match="UserError: out of memory"):
        train.finetune(_clients(recipe, tmp_path), recipe, run, _quiet)
    name = jobs.recorded_jobs(run)["train"].name
    made = [path.name for path in (azure.folder / "jobs").iterdir() if "piped" in path.name]
    assert made == [name]  # the answer that was lost started no second one
    sent = json.loads((azure.folder / "jobs" / name / "job.json").read_text())["inputs"]
    assert sent.keys() <= INPUTS.keys()
    assert not sent.keys() & {"learning_rate_min", "learning_rate_max"}
    literal = {key: item["literal"] for key, item in sent.items() if item["literal"] is not None}
    assert literal["learning_rate"] == "5e-06"  # the model's own
    assert literal["deepspeed_stage"] == "2"
    assert literal["apply_lora"] == "true"
    assert literal["number_of_gpu_to_use_finetuning"] == "1"
    assert literal["compute_finetune"] == recipe.azure.compute.name


@pytest.mark.slow
def test_a_pipeline_trains_and_a_second_job_measures(
    provisioned: object, recipe_file: Path, tmp_path: Path
) -> None:
    words = [
        "azure.train.route=pipeline",
        "azure.train.foundation_model={name: Phi-4, version: 8}",
    ]
    recipe = load_recipe(recipe_file, [*POLLS, *words])
    run, clients = _prepared(recipe, tmp_path / "piped-well"), _clients(recipe, tmp_path)
    manifest = train.finetune(clients, recipe, run, _quiet)
    assert manifest.route == "pipeline"
    assert manifest.foundation_model.name == "Phi-4"
    run.write(manifest)
    metrics = train.evaluate(clients, recipe, run, _quiet)
    names = {purpose: ticket.name for purpose, ticket in jobs.recorded_jobs(run).items()}
    assert names == {"train": manifest.job, "evaluate": metrics.job}
    assert names["train"] != names["evaluate"]
    assert [clients.ml.jobs.get(name).status for name in names.values()] == ["Completed"] * 2
    assert metrics.after["validation"]["rows"] > 0
    assert (run.path / metrics.rows).is_file()


def test_a_storage_that_refuses_uploads_ends_the_command_with_its_reason(
    provisioned: object, azure: rehearsal.Rehearsal, recipe_file: Path, tmp_path: Path
) -> None:
    """azure-ai-ml itself would wait for ever for the files of a folder."""
    chats = (recipe_file.parent / "chats.jsonl").read_text().replace("euros", "pounds")
    (tmp_path / "others.jsonl").write_text(chats)
    recipe = load_recipe(recipe_file, [*POLLS, f"data.train={tmp_path / 'others.jsonl'}"])
    run = _prepared(recipe, tmp_path / "refused")
    before = len(azure.calls())
    azure.fault("PUT *.blob.core.windows.net/* 403 code=AuthorizationFailure times=100")
    try:
        with pytest.raises(StageError, match=r"AuthorizationFailure(?s:.*)network rules"):
            train.finetune(_clients(recipe, tmp_path), recipe, run, _quiet)
    finally:
        Faults(azure.folder / "faults.json").clear()
    refused = [call for call in azure.calls()[before:] if call["status"] == 403]
    assert len(refused) == 1
    assert _puts(azure, run) == 0


def test_a_cancelled_job_is_a_failure(
    provisioned: object,
    azure: rehearsal.Rehearsal,
    recipe: Recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = _prepared(recipe, tmp_path / "stopped")
    settle(recipe.azure, run)
    cancel = ["azure", "cancel", "--run", run.name, "--runs", str(run.path.parent)]
    clients = _clients(recipe, tmp_path)
    azure.fault("* */jobs/phi3-train-stopped* slow seconds=60")
    ended: list[int] = []

    def progress(_done: int, _total: int, text: str) -> None:
        if text.startswith("running") and not ended:
            ended.append(main(cancel))

    with pytest.raises(StageError, match="was cancelled"):
        train.finetune(clients, recipe, run, progress)
    assert ended == [0]
    told = f"cancelled the job {jobs.recorded_jobs(run)['train'].name}"
    assert told in capsys.readouterr().out.splitlines()
    assert main(cancel) == 0
    assert "This run has no active job." in capsys.readouterr().out
    sent = [
        call["path"]
        for call in azure.calls()
        if call["path"].endswith("/data/train.jsonl")
        and (call["method"], call["status"]) == ("PUT", 201)
    ]
    assert len(sent) == len(set(sent))  # once for one content, whoever trains on it


def test_the_commands_say_what_they_did(
    provisioned: object,
    azure: rehearsal.Rehearsal,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(recipe_file), *POLLS]
    assert main(["azure", "provision", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 12
    assert all(line.startswith("exists ") for line in lines)
    assert main(["azure", "provision", *words, "-o", "json", "--least-privilege"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert not [step for step in steps if "Contributor" in step["name"]]
    assert main(["azure", "quota", *words]) == 0
    assert "needs 24 cores of standardNCADSA100v4Family" in capsys.readouterr().out
    assert main(["azure", "quota", *words, "azure.endpoint.instance_count=9"]) == 1
    shown = capsys.readouterr().out
    assert "too little" in shown
    # 24 more while the cluster still has the node of an earlier test's job.
    asked = re.search(r"phi3 azure quota --request (216|240)\n", shown)
    assert asked
    assert main(["azure", "quota", *words, "--request", asked[1], "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"].startswith("granted")
    assert main(["azure", "quota", *words, "azure.endpoint.instance_count=9"]) == 0
    assert main(["azure", "quota", "azure.location=east-us"]) == 2
    assert main(["azure"]) == 2
