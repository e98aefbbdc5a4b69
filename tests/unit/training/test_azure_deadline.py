"""Deadlines against the rehearsed Azure in this process: its clock moves, no client is alive."""

from __future__ import annotations

import datetime as dt
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from pydantic import ValidationError

from phi3_rehearsal import endpoints, logic, resources
from phi3_rehearsal.compute import DEPLOYMENT_KIND
from phi3_rehearsal.identity import token_for
from phi3_rehearsal.proxy import answer
from phi3_rehearsal.wire import ARM, Request
from phi3_training.cli import main
from phi3_training.errors import StageError, UsageError
from phi3_training.recipe.azure import AzureSection, duration_of
from phi3_training.run import Run
from phi3_training.targets.azure import target
from phi3_training.targets.azure.costs import set_budget
from phi3_training.targets.azure.deadline import (
    endpoint_id,
    extend_deadline,
    hold_deadline,
    read_deadline,
    remove_deadline,
    workflow_id,
)
from phi3_training.targets.azure.status import take_inventory
from phi3_training.targets.azure.teardown import Found, find_places
from phi3_training.targets.azure.workflow import Dated, iso, utc_now, workflow_body

from .azure_rehearsed import Rehearsed, with_endpoint
from .azure_wire import SUBSCRIPTION

HOUR = 3600.0
SERVICES = (resources,)  # importing a service's module declares its calls


def silent(_done: int, _total: int, _text: str) -> None:
    """A progress that nobody reads."""


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsed:
    """A workspace with the run's endpoint and its deployment, and another's endpoint."""
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path / "cache"))
    return with_endpoint(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "mine")


def section(deadline: str = "8h") -> AzureSection:
    return AzureSection.model_validate({"endpoint": {"deadline": deadline}})


def hold(azure: Rehearsed, run: Run, deadline: str = "8h", **endpoint: Any) -> str:
    own: Any = SimpleNamespace(**{"name": "ep", "tags": {"phi3_run": run.name}, **endpoint})
    return hold_deadline(azure, section(deadline), run, own, silent)


def advance(azure: Rehearsed, hours: float) -> None:
    body = json.dumps({"seconds": hours * HOUR}).encode()
    assert (
        answer(azure.cloud, Request("POST", "rehearsal.invalid", "/clock", {}, body)).status == 200
    )


def exists(azure: Rehearsed, name: str = "ep") -> bool:
    return azure.cloud.get(endpoint_id(azure.place, name)) is not None


def hours_left(azure: Rehearsed) -> float | None:
    at = read_deadline(azure, "ep").at
    return None if at is None else (at.timestamp() - time.time()) / HOUR


def test_the_moved_clock_alone_leaves_nothing_that_bills(azure: Rehearsed, run: Run) -> None:
    told = hold(azure, run)

    assert "costs at most 29.38 USD, then it deletes itself" in told
    assert "never verified on live Azure" in told
    advance(azure, 7.9)
    assert exists(azure)
    advance(azure, 0.2)
    assert not exists(azure)
    assert azure.cloud.children("/subscriptions", DEPLOYMENT_KIND) == []
    assert exists(azure, "theirs")
    assert azure.cloud.get(azure.place.workspace_id()) is not None


def test_the_workflow_is_what_logic_apps_need(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    workflow = azure.cloud.get(workflow_id(azure.place, "ep"))
    assert workflow is not None
    definition = workflow["properties"]["definition"]
    recurrence = definition["triggers"]["deadline"]["recurrence"]
    assert (recurrence["frequency"], recurrence["interval"]) == ("Hour", 1)
    starts, ends = (
        dt.datetime.fromisoformat(recurrence[key].replace("Z", "+00:00"))
        for key in ("startTime", "endTime")
    )
    assert ends - starts == dt.timedelta(days=7)
    (guarded,) = definition["actions"].values()
    assert guarded["expression"] == (
        f"@greaterOrEquals(ticks(utcNow()), ticks('{recurrence['startTime']}'))"
    )
    (action,) = guarded["actions"].values()
    assert action["operationOptions"] == "DisableAsyncPattern"
    assert action["inputs"]["uri"].startswith(f"https://{ARM}{endpoint_id(azure.place, 'ep')}?")
    roles = azure.cloud.children("/subscriptions", "Microsoft.Authorization/roleAssignments")
    assert [role["properties"]["scope"] for role in roles] == [endpoint_id(azure.place, "ep")]


def test_it_can_delete_nothing_else(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    workflow = azure.cloud.get(workflow_id(azure.place, "ep"))
    assert workflow is not None
    token = token_for(azure.cloud, workflow["identity"]["principalId"], f"https://{ARM}")
    for arm_id in [key for key in azure.cloud.resources if "/onlineendpoints/ep" not in key]:
        headers = {"authorization": f"Bearer {token}"}
        reply = answer(azure.cloud, Request("DELETE", ARM, arm_id, headers, b""))
        assert reply.status == 403, arm_id


@pytest.mark.parametrize("ago", [dt.timedelta(0), dt.timedelta(days=3)])
def test_a_body_without_a_future_start_is_never_made(ago: dt.timedelta) -> None:
    """Logic Apps would run at once; also for a request that is due, or was refused until now."""
    request = Dated("delete_x", "x", utc_now() - ago, "DELETE", "/x", "2025-12-01")
    (trigger,) = workflow_body([request], "eastus", {})["properties"]["definition"][
        "triggers"
    ].values()
    assert trigger["recurrence"]["startTime"] > iso(utc_now())
    assert trigger["recurrence"]["endTime"] > trigger["recurrence"]["startTime"]
    with pytest.raises(ValueError, match="needs a request"):
        workflow_body([], "eastus", {})


def test_it_is_moved_later_and_never_earlier(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "2d")
    hold(azure, run, "1h")
    assert hours_left(azure) == pytest.approx(48, abs=0.1)
    before, after = extend_deadline(azure, section(), "ep", dt.timedelta(hours=4), silent)
    assert before.at is not None
    assert after.at is not None
    assert after.at - before.at == dt.timedelta(hours=4)
    assert hours_left(azure) == pytest.approx(52, abs=0.1)
    workflows = azure.cloud.children("/subscriptions", logic.KIND)
    assert len(workflows) == 1


@pytest.fixture
def elsewhere(azure: Rehearsed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`phi3 azure extend 4h` on a machine that has no run folder, only the sign-in."""

    def same_azure(here: Any, *_more: Any) -> Rehearsed:
        made = Rehearsed(here, azure.poll, azure.credential)
        made.cloud = azure.cloud
        return made

    monkeypatch.setattr(target, "Clients", same_azure)
    monkeypatch.setenv("AZURE_SUBSCRIPTION_ID", SUBSCRIPTION)
    return ["azure", "extend", "4h", "--runs", str(tmp_path / "empty")]


@pytest.mark.parametrize("words", [[], ["--endpoint", "ep"], ["--workspace", "phi3-workspace"]])
def test_it_is_moved_from_a_machine_without_the_run_folder(
    azure: Rehearsed,
    run: Run,
    elsewhere: list[str],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    hold(azure, run, tags={"team": "ours", "phi3_run": run.name})
    workflow = azure.cloud.get(workflow_id(azure.place, "ep"))
    assert workflow is not None
    workflow["tags"]["cost-centre"] = "17"  # of the recipe, which is not here
    assert main([*elsewhere, *words]) == 0
    assert re.search(r"\(in (11 h 59 min|12 h)\)", capsys.readouterr().out)
    assert hours_left(azure) == pytest.approx(12, abs=0.1)
    workflow = azure.cloud.get(workflow_id(azure.place, "ep"))
    assert workflow is not None
    assert (workflow["tags"]["phi3-run"], workflow["tags"]["cost-centre"]) == ("mine", "17")


def test_without_a_run_folder_one_endpoint_must_be_meant(
    azure: Rehearsed, run: Run, elsewhere: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = azure.cloud.get(endpoint_id(azure.place, "ep"))
    assert first is not None
    azure.cloud.put(endpoint_id(azure.place, "ep2"), endpoints.KIND, {**first, "name": "ep2"})
    assert main(elsewhere) == 2
    said = capsys.readouterr().err
    assert "Add --endpoint NAME or --workspace NAME" in said
    assert "ep2 in the workspace phi3-workspace" in said
    assert main([*elsewhere, "--endpoint", "theirs"]) == 1  # phi3 did not make it
    assert "phi3 has made no endpoint theirs in workspace phi3-workspace" in capsys.readouterr().err
    assert main([*elsewhere, "--endpoint", "ep", "--run", run.name]) == 2
    assert azure.cloud.children("/subscriptions", logic.KIND) == []


@pytest.mark.parametrize("fault", ["reset", "reset-after", "500", "409 code=Conflict"])
def test_a_fault_on_the_way_is_survived(azure: Rehearsed, run: Run, fault: str) -> None:
    hold(azure, run, "1h")
    azure.cloud.faults.add(f"PUT */Microsoft.Logic/* {fault}")
    assert "then it deletes itself" in hold(azure, run, "8h")
    assert hours_left(azure) == pytest.approx(8, abs=0.1)


def test_a_provider_that_is_not_registered_is_registered(azure: Rehearsed, run: Run) -> None:
    azure.cloud.faults.add("PUT */Microsoft.Logic/* 409 code=MissingSubscriptionRegistration")
    assert "then it deletes itself" in hold(azure, run)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("PUT */Microsoft.Logic/* 403 code=RequestDisallowedByPolicy times=9", "policy"),
        ("POST */register 403 times=9", "Registering the provider Microsoft.Logic"),
        ("PUT */roleAssignments/* 403 times=9", "User Access Administrator"),
        ("PUT */roleAssignments/* 400 times=9", "AzureML Data Scientist"),
    ],
)
def test_where_none_can_be_made_it_says_so(
    azure: Rehearsed, run: Run, fault: str, reason: str
) -> None:
    azure.cloud.faults.add(fault)
    if "register" in fault:
        azure.cloud.faults.add("PUT */Microsoft.Logic/* 409 code=MissingSubscriptionRegistration")
    told = hold(azure, run)
    assert told.startswith("NO deadline holds for ep: ")
    assert reason in told
    assert "phi3 azure budget" in told
    assert azure.cloud.children("/subscriptions", logic.KIND) == []  # no false safety
    assert read_deadline(azure, "ep").at is None


def test_none_is_none_and_takes_one_away(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    assert hold(azure, run, "none").startswith("no deadline")
    advance(azure, 100)
    assert exists(azure)


def test_a_workflow_of_an_older_phi3_still_holds(azure: Rehearsed, run: Run) -> None:
    """It sends one request without a condition; the next deployment rewrites it."""
    hold(azure, run)
    workflow = azure.cloud.get(workflow_id(azure.place, "ep"))
    assert workflow is not None
    definition = workflow["properties"]["definition"]
    (guarded,) = definition["actions"].values()
    definition["actions"] = {"delete_endpoint": guarded["actions"]["delete_endpoint_now"]}
    assert read_deadline(azure, "ep").holds
    hold(azure, run, "2d")
    assert hours_left(azure) == pytest.approx(48, abs=0.1)


def test_what_phi3_did_not_create_gets_no_deadline(azure: Rehearsed, run: Run) -> None:
    told = hold(azure, run, name="theirs", tags={})
    assert "NO deadline holds: phi3 did not create the endpoint theirs" in told
    with pytest.raises(StageError, match="did not create"):
        extend_deadline(azure, section(), "theirs", dt.timedelta(hours=1), silent)
    with pytest.raises(StageError, match="does not exist"):
        extend_deadline(azure, section(), "gone", dt.timedelta(hours=1), silent)
    assert azure.cloud.children("/subscriptions", logic.KIND) == []


def test_anothers_workflow_of_that_name_is_left_alone(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    workflow = azure.cloud.get(workflow_id(azure.place, "ep"))
    assert workflow is not None
    workflow["tags"]["phi3-workspace"] = "another-workspace"
    assert "phi3 did not make for it" in hold(azure, run, "2d")
    assert not remove_deadline(azure, "ep", silent)


def test_a_deadline_that_cannot_delete_is_not_called_one(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    (role,) = azure.cloud.children("/subscriptions", "Microsoft.Authorization/roleAssignments")
    azure.cloud.delete(role["id"])
    assert not read_deadline(azure, "ep").holds
    assert "has no role" in read_deadline(azure, "ep").text()
    hold(azure, run)  # the next deployment fixes it
    assert read_deadline(azure, "ep").holds


def test_a_new_endpoint_is_not_ended_by_the_old_ones_deadline(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    document = dict(azure.cloud.get(endpoint_id(azure.place, "ep")) or {})
    advance(azure, 9)
    azure.cloud.put(endpoint_id(azure.place, "ep"), endpoints.KIND, document)
    azure.cloud.clock = 0.0  # this machine's clock was not moved with Azure's
    hold(azure, run)
    advance(azure, 7)
    assert exists(azure)
    advance(azure, 2)
    assert not exists(azure)


def test_the_inventory_knows_the_deadline(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    found = {endpoint.name: endpoint for endpoint in take_inventory(azure).endpoints}
    assert found["theirs"].deadline is None
    assert any("then it deletes itself" in line for line in found["ep"].lines())


def test_a_lost_laptop_finds_and_ends_it_by_its_tags(azure: Rehearsed, run: Run) -> None:
    hold(azure, run)
    (there,) = find_places(azure)
    assert there.workspace_id() == azure.place.workspace_id()
    found = Found(azure)
    assert found.names() == ["endpoint ep and its deployments", "deadline of ep"]
    told = found.delete(silent, everything=False)
    assert "deleted: endpoint ep and its deployments" in told
    assert "deleted: deadline of ep" in told
    assert exists(azure, "theirs")
    assert azure.cloud.children("/subscriptions", logic.KIND) == []
    assert Found(azure).names() == []


def test_a_workspace_of_somebody_else_is_found_by_the_deadline_in_it(
    azure: Rehearsed, run: Run
) -> None:
    hold(azure, run)
    workspace = azure.cloud.get(azure.place.workspace_id())
    assert workspace is not None
    workspace["tags"] = {}
    (there,) = find_places(azure)
    assert there.workspace_name == azure.place.workspace_name


def test_the_budget_mails_and_stops_nothing(azure: Rehearsed) -> None:
    assert "stops nothing" in set_budget(azure, 50, ["me@example.com"])
    (budget,) = azure.cloud.children("/subscriptions", "Microsoft.Consumption/budgets")
    assert budget["properties"]["amount"] == 50
    for amount, mail in ((0, "me@example.com"), (50, "me")):
        with pytest.raises(UsageError, match="Expected an amount"):
            set_budget(azure, amount, [mail])


@pytest.mark.parametrize(
    ("text", "minutes"), [("8h", 480), ("90m", 90), ("2d12h", 3600), ("1d0h30m", 1470)]
)
def test_durations(text: str, minutes: int) -> None:
    assert duration_of(text) == dt.timedelta(minutes=minutes)


@pytest.mark.parametrize(
    "value", ["", "8", "h", "8 hours", "5m", "91d", "99999999999d", None, 8, False, "never"]
)
def test_no_deadline_must_be_asked_for_explicitly(value: object) -> None:
    with pytest.raises(ValidationError, match="write none in so many words"):
        AzureSection.model_validate({"endpoint": {"deadline": value}})
    assert section("none").endpoint.deadline == "none"
