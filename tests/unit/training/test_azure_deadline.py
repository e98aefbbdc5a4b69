"""Deadlines against the rehearsed Azure in this process: its clock moves, no client is alive."""

from __future__ import annotations

import datetime as dt
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from pydantic import ValidationError

from phi3_rehearsal import budgets, endpoints, logic, resources, workspaces
from phi3_rehearsal.compute import DEPLOYMENT_KIND
from phi3_rehearsal.identity import token_for
from phi3_rehearsal.proxy import answer
from phi3_rehearsal.wire import ARM, Request
from phi3_training.errors import StageError, UsageError
from phi3_training.recipe.azure import AzureSection, duration_of
from phi3_training.run import Run
from phi3_training.targets.azure.budget import set_budget
from phi3_training.targets.azure.deadline import (
    endpoint_id,
    extend_deadline,
    hold_deadline,
    read_deadline,
    remove_deadline,
    workflow_body,
    workflow_id,
)
from phi3_training.targets.azure.discovery import Found, find_places
from phi3_training.targets.azure.inventory import take_inventory

from .azure_rehearsed import Rehearsed, rehearsed
from .azure_wire import place

HOUR = 3600.0
GPU = "Standard_NC24ads_A100_v4"
SERVICES = (resources, budgets)  # importing a service's module declares its calls


def silent(_done: int, _total: int, _text: str) -> None:
    """A progress that nobody reads."""


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsed:
    """A workspace with the run's endpoint and its deployment, and another's endpoint."""
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path / "cache"))
    here = place(tmp_path)
    clients = rehearsed(tmp_path, here)
    cloud = clients.cloud
    ready = {"provisioningState": "Succeeded"}
    body = {"location": here.location, "tags": {"created-by": "phi3-promptflow"}}
    for arm_id, kind in (
        (here.group_scope, "Microsoft.Resources/resourceGroups"),
        (here.workspace_id(), workspaces.KIND),
    ):
        cloud.put(arm_id, kind, {**body, "kind": "Default", "properties": dict(ready)})
    for name, tags in (("ep", {"phi3_run": "mine"}), ("theirs", {})):
        properties = {
            **ready,
            "authMode": "Key",
            "traffic": {},
            "scoringUri": f"https://{name}/score",
        }
        document = {"location": here.location, "tags": tags, "kind": "Managed"}
        cloud.put(endpoint_id(here, name), endpoints.KIND, {**document, "properties": properties})
    properties = {
        **ready,
        "instanceType": GPU,
        "endpointComputeType": "Managed",
        "scaleSettings": {"scaleType": "Default"},
    }
    document = {"location": here.location, "kind": "Managed", "sku": {"capacity": 1}}
    deployment = f"{endpoint_id(here, 'ep')}/deployments/blue"
    cloud.put(deployment, DEPLOYMENT_KIND, {**document, "properties": properties})
    return clients


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
    (action,) = definition["actions"].values()
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


def test_a_body_without_a_future_start_is_never_made(azure: Rehearsed) -> None:
    past = dt.datetime.now(dt.timezone.utc) - dt.timedelta(minutes=1)
    with pytest.raises(ValueError, match="is past"):
        workflow_body(endpoint_id(azure.place, "ep"), "eastus", past, {})


def test_it_is_moved_later_and_never_earlier(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "2d")
    hold(azure, run, "1h")
    assert hours_left(azure) == pytest.approx(48, abs=0.1)
    before, after = extend_deadline(azure, section(), run, "ep", dt.timedelta(hours=4), silent)
    assert before.at is not None
    assert after.at is not None
    assert after.at - before.at == dt.timedelta(hours=4)
    assert hours_left(azure) == pytest.approx(52, abs=0.1)
    workflows = azure.cloud.children("/subscriptions", logic.KIND)
    assert len(workflows) == 1


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


def test_what_phi3_did_not_create_gets_no_deadline(azure: Rehearsed, run: Run) -> None:
    told = hold(azure, run, name="theirs", tags={})
    assert "NO deadline holds: phi3 did not create the endpoint theirs" in told
    with pytest.raises(StageError, match="did not create"):
        extend_deadline(azure, section(), run, "theirs", dt.timedelta(hours=1), silent)
    with pytest.raises(StageError, match="does not exist"):
        extend_deadline(azure, section(), run, "gone", dt.timedelta(hours=1), silent)
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
