"""What to check first on Azure, over the rehearsed Azure in this process; nothing is left."""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import compute, control, endpoints, jobs, logic, offers, resources, workspaces
from phi3_rehearsal.cloud import Cloud, now
from phi3_training.cli import main
from phi3_training.errors import StageError
from phi3_training.progress import no_progress
from phi3_training.project import find
from phi3_training.recipe import load_recipe
from phi3_training.recipe.azure import GPU_SIZE, AzureSection
from phi3_training.run import Run
from phi3_training.targets.azure import check_live
from phi3_training.targets.azure import clients as azure_clients
from phi3_training.targets.azure.check_live import (
    CHECK_TAG,
    LiveCheck,
    Outcome,
    check_section,
    list_steps,
    run_steps,
)
from phi3_training.targets.azure.costs import Prices
from phi3_training.targets.azure.place import find_place

from .azure_rehearsed import Rehearsed, rehearsed
from .azure_wire import SUBSCRIPTION, place

NAME = "phi3-check-0a1b2c3d"
SERVICES = (compute, control, endpoints, jobs, logic, offers, resources, workspaces)


class Blob:
    """One blob in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def download_blob(self) -> Blob:
        return self

    def readall(self) -> bytes:
        return self.content

    def delete_blob(self) -> None:
        """Nothing is kept."""


class Container:
    """A container that takes every upload."""

    def upload_blob(self, _name: str, content: bytes, **_options: Any) -> Blob:
        return Blob(content)


def made_at_once(clients: Any, *_args: Any, **_options: Any) -> None:
    """azure-ai-ml makes a workspace with a client of its own, which would reach for the network."""
    here, body = clients.place, {"location": "eastus", "tags": {}}
    ready = {"provisioningState": "Succeeded"}
    document = {**body, "kind": "Default", "properties": dict(ready)}
    clients.cloud.put(here.workspace_id(), workspaces.KIND, document)
    clients.identities.user_assigned_identities.create_or_update(NAME, here.identity, body)


def listed_prices(_url: str, query: dict[str, str], _seconds: float) -> Any:
    size = query["$filter"].split("armSkuName eq '")[1].split("'")[0]
    row = {
        "type": "Consumption",
        "armSkuName": size,
        "armRegionName": "eastus",
        "unitOfMeasure": "1 Hour",
        "retailPrice": 0.229,
        "effectiveStartDate": "2024-01-01",
    }
    return {"Items": [row]}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LiveCheck:
    monkeypatch.setattr(check_live, "open_store", lambda *_args: (Container(), []))
    monkeypatch.setattr(check_live, "provision", made_at_once)
    monkeypatch.setattr(check_live, "FIRED_LEAD", dt.timedelta(0))
    theirs = AzureSection(
        subscription_id=SUBSCRIPTION, resource_group="theirs", storage_account="theirstorage"
    )
    section = check_section(theirs, place(tmp_path), NAME)
    clients = rehearsed(tmp_path, find_place(section, {}, tmp_path))
    clients.prices = Prices(listed_prices, tmp_path / "prices.json")
    recipe = load_recipe(find(Path("training/recipes/phi3-tiny-azure.yaml")))
    poll = section.poll.model_copy(update={"interval": 0.05, "job_interval": 0.05})
    section = section.model_copy(update={"poll": poll})
    recipe = recipe.model_copy(update={"azure": section})
    return LiveCheck(clients, recipe, Run.open(tmp_path / NAME))


def run(check: LiveCheck, *, wanted: Iterable[int] = range(1, 8)) -> dict[int, Outcome]:
    """The outcomes by number; 10 is the deletion of what is left."""
    outcomes: list[Outcome] = []
    run_steps(
        check,
        list_steps(check),
        lambda number, _step: number in wanted,
        lambda: nullcontext(no_progress),
        outcomes.append,
    )
    return dict(enumerate(outcomes, start=1))


def cloud_of(check: LiveCheck) -> Cloud:
    assert isinstance(check.clients, Rehearsed)
    return check.clients.cloud


def groups(check: LiveCheck) -> list[str]:
    return [key for key in cloud_of(check).resources if "/resourcegroups/" in key.lower()]


def test_the_list_is_cheapest_first_with_a_price_before_each(check: LiveCheck) -> None:
    steps = list_steps(check)
    prices = [step.price for step in steps]
    assert prices[:5] == ["free"] * 5
    assert all("cent" in price for price in prices[5:8])
    assert "0.23 USD per hour of Standard_DS3_v2 (list price of eastus" in prices[7]
    assert "0.23 USD per hour of Standard_NC24ads_A100_v4" in prices[8]
    assert [bool(step.commands) for step in steps] == [step.run is None for step in steps]
    assert cloud_of(check).resources == {}


def test_by_hand_has_keys_of_this_version(check: LiveCheck) -> None:
    up, down = (command for step in list_steps(check) for command in step.commands)
    recipe = load_recipe(find(Path(up.split()[2])), [word for word in up.split() if "=" in word])
    assert recipe.azure.endpoint.deadline == "1h"
    assert recipe.azure.resource_group == "phi3-check-tiny"
    assert "--all --run phi3-check-tiny" in down


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line, without a terminal, with prices that were asked before."""
    kept = {"asked": time.time(), "prices": [0.229]}
    cache = {f"eastus/{size}": kept for size in (check_live.CPU_SIZE, GPU_SIZE)}
    (tmp_path / "azure-prices.json").write_text(json.dumps(cache), encoding="utf-8")
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path))
    monkeypatch.setattr("os.isatty", lambda _fd: False)
    recipe = str(find(Path("training/recipes/phi3-tiny-azure.yaml")))
    keys = (f"subscription_id={SUBSCRIPTION}", "location=eastus", "poll.interval=0.05")
    return ["azure", "check-live", recipe, *(f"azure.{key}" for key in keys)]


def test_without_a_terminal_and_yes_it_only_lists(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "never verified on live Azure" in said
    assert "Nothing was run" in said
    assert "0.23 USD per hour of Standard_DS3_v2" in said
    assert said.index(" 8. ") < said.index(" 9. ") < said.index("phi3 up ")
    assert main([*command, "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [step["price"] for step in told["steps"]][:5] == ["free"] * 5
    assert told["outcomes"] == []


def test_yes_runs_it_with_the_price_before_each_and_fails_with_a_step(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*_args: object, **_options: object) -> None:
        raise StageError("the workspace was refused")

    monkeypatch.setattr(check_live, "provision", refused)
    monkeypatch.setattr(azure_clients, "Clients", lambda here, _poll: rehearsed(tmp_path, here))
    assert main([*command, "--yes"]) == 1
    said = capsys.readouterr().out.partition("az group delete")[2]
    asked = said.index("6. a workspace and an identity with its roles")
    assert asked < said.index("some cents: registry") < said.index("FAILED   a workspace")
    assert "the workspace was refused" in said
    assert "passed   deletion of what is left" in said


def test_each_step_passes_and_nothing_is_left(check: LiveCheck) -> None:
    outcomes = run(check)
    states = [outcome.state for outcome in outcomes.values()]
    assert states == ["passed"] * 7 + ["skipped", "by hand", "passed"], outcomes
    assert "fired by hand, the workflow deleted the endpoint; its runs: Succeeded" in (
        outcomes[7].detail
    )
    assert groups(check) == []
    journal = (cloud_of(check).folder / "calls.jsonl").read_text(encoding="utf-8")
    calls = [json.loads(line) for line in journal.splitlines()]
    sent = [call["path"] for call in calls if call["method"] != "GET"]
    assert all(NAME in path for path in sent)


def test_what_is_declined_is_not_run(check: LiveCheck) -> None:
    outcomes = run(check, wanted=())
    assert {outcome.state for outcome in outcomes.values()} == {"skipped", "by hand"}
    assert len(outcomes) == 9  # nothing to delete either


@pytest.mark.parametrize(
    ("fault", "failed", "reason"),
    [
        ("GET */subscriptions/00000000-1111-2222-3333-444444444444 403 times=9", 1, "403"),
        ("PUT */resourceGroups/* 403 times=9", 5, "Contributor"),
        ("PUT */onlineEndpoints/* 400 times=9", 7, "400"),
        ("PUT */roleAssignments/* 403 times=9", 7, "User Access Administrator"),
        ("POST */triggers/deadline/run 403 times=9", 7, "403"),
    ],
)
def test_a_failure_is_reported_and_nothing_is_left(
    check: LiveCheck, fault: str, failed: int, reason: str
) -> None:
    cloud_of(check).faults.add(fault)
    outcomes = run(check)
    assert outcomes[failed].state == "FAILED"
    assert reason in outcomes[failed].detail
    assert all(outcome.state != "FAILED" for n, outcome in outcomes.items() if n < failed)
    assert groups(check) == []


@pytest.mark.parametrize(("ends", "state"), [("Completed", "passed"), ("Failed", "FAILED")])
def test_the_cluster_goes_however_its_job_ends(
    check: LiveCheck, monkeypatch: pytest.MonkeyPatch, ends: str, state: str
) -> None:
    jobs, seen = check.clients.ml.jobs, iter(("Queued", "Running", ends))
    sent: list[Any] = []
    monkeypatch.setattr(jobs, "create_or_update", sent.append)
    monkeypatch.setattr(jobs, "get", lambda _name: SimpleNamespace(status=next(seen)))
    outcomes = run(check, wanted=(1, 6, 8))
    assert outcomes[8].state == state, outcomes[8]
    assert (sent[0].compute, sent[0].command) == ("phi3-check-cpu", "echo ready")
    journal = (cloud_of(check).folder / "calls.jsonl").read_text(encoding="utf-8")
    calls = [json.loads(line) for line in journal.splitlines()]
    done = [call["method"] for call in calls if call["path"].endswith("/computes/phi3-check-cpu")]
    assert [method for method in done if method != "GET"] == ["PUT", "DELETE"]
    assert groups(check) == []


@pytest.mark.parametrize("goes", [True, False])
def test_the_node_of_the_job_must_go(
    check: LiveCheck, monkeypatch: pytest.MonkeyPatch, goes: bool
) -> None:
    cloud = cloud_of(check)

    def ended(job: Any) -> None:
        """The job has run on the cluster and its node idles; after 0.3 s two minutes are over."""
        cluster = f"{check.place.workspace_id()}/computes/{job.compute}"
        document = {"properties": {"status": "Completed", "computeId": cluster}}
        arm_id = f"{check.place.workspace_id()}/jobs/{job.name}"
        cloud.put(arm_id, jobs.KIND, {**document, "_times": {"end": now()}})
        if goes:
            threading.Timer(0.3, lambda: setattr(cloud, "clock", 121.0)).start()

    known = check.clients.ml.jobs
    monkeypatch.setattr(known, "create_or_update", ended)
    monkeypatch.setattr(known, "get", lambda _name: SimpleNamespace(status="Completed"))
    monkeypatch.setattr(check_live, "RELEASE_SECONDS", 30.0 if goes else -119.5)
    outcome = run(check, wanted=(1, 6, 8))[8]
    if goes:
        assert outcome.state == "passed", outcome
        assert "later the cluster had no node any more" in outcome.detail
    else:
        assert outcome.state == "FAILED"
        assert "the cluster still has 1 node(s)" in outcome.detail
    assert groups(check) == []


def test_a_workflow_that_deletes_nothing_fails_the_step(
    check: LiveCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_live, "FIRED_SECONDS", 0.1)
    cloud_of(check).faults.add("DELETE */onlineEndpoints/* 403 times=1")
    outcomes = run(check)
    assert "still exists, so no deadline would hold here; its runs: Failed" in outcomes[7].detail
    assert groups(check) == []


def test_a_group_that_is_not_the_checks_own_is_left_alone(check: LiveCheck) -> None:
    body: Any = {"location": "eastus", "tags": {CHECK_TAG: "another"}}
    check.clients.resources.resource_groups.create_or_update(NAME, body)
    outcomes = run(check, wanted=(1, 5, 6))
    assert "exists already and is left alone" in outcomes[5].detail
    assert outcomes[6].state == "FAILED"
    assert len(groups(check)) == 1


def test_ctrl_c_deletes_all_the_same(check: LiveCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_live, "hold_deadline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(check)
    assert groups(check) == []


def test_a_deletion_that_is_refused_names_what_may_bill(check: LiveCheck) -> None:
    cloud_of(check).faults.add("DELETE */resourceGroups/phi3-check-* 403 code=ScopeLocked times=9")
    last = list(run(check, wanted=(1, 5)).values())[-1]
    assert last.state == "FAILED"
    assert f"az group delete --name {NAME}" in last.detail


def test_names_of_the_recipe_are_not_taken_over(check: LiveCheck) -> None:
    names = [value for value in vars(check.place).values() if isinstance(value, str)]
    assert not any("theirs" in name for name in names)
