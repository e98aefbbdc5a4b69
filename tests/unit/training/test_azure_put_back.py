"""What an endpoint's workflow does before its deadline, by the moved clock alone: deployments
without traffic go, and a rollout that nobody ends is undone."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import identity, jobs, logic, resources
from phi3_rehearsal.compute import DEPLOYMENT_KIND
from phi3_rehearsal.identity import token_for
from phi3_rehearsal.proxy import answer
from phi3_rehearsal.wire import ARM, Request
from phi3_training.progress import no_progress
from phi3_training.recipe.azure import AzureSection
from phi3_training.run import Run
from phi3_training.targets.azure.deadline import (
    Now,
    endpoint_id,
    extend_deadline,
    hold_deadline,
    read_deadline,
    removals_of,
    settle_removals,
    workflow_id,
)
from phi3_training.targets.azure.resources import IDENTITY
from phi3_training.targets.azure.rollout import PutBackKeeper
from phi3_training.targets.azure.status import take_inventory
from phi3_training.targets.azure.teardown import Found
from phi3_training.targets.azure.traffic import Wanted, set_traffic

from .azure_rehearsed import Rehearsed, add_deployment, with_endpoint

EP, HOUR = "chat", 3600.0
OURS = {"phi3_run": "mine"}
TAG = "to green from blue=100 since 2026-11-29T10:00:00+00:00"
HALF = {"blue": 95, "green": 5}
UAI = "Microsoft.ManagedIdentity/userAssignedIdentities"
SERVICES = (identity, jobs, logic, resources)  # importing a service's module declares its calls


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsed:
    """The endpoint `chat` with an identity of its own; `blue` has the traffic, `green` none."""
    monkeypatch.setenv("PHI3_CACHE", str(tmp_path / "cache"))
    clients = with_endpoint(tmp_path, EP)
    add_deployment(clients, EP, "blue", OURS)
    add_deployment(clients, EP, "green", OURS)
    here = clients.place
    users = {}
    for name in (here.identity, "another-identity"):
        body = {"location": here.location, "tags": {}}
        clients.identities.user_assigned_identities.create_or_update(
            here.resource_group,
            name,
            body,  # type: ignore[call-overload]
        )
        users[here.resource_id(UAI, name)] = {"principalId": "p", "clientId": "c"}
    document = endpoint(clients)
    document["identity"] = {
        "type": "UserAssigned",
        "userAssignedIdentities": {IDENTITY.id(here): users[IDENTITY.id(here)]},
    }
    # Texts that Logic Apps would take for expressions.
    document["tags"] |= {"mail": "@team", "odd": "a@{b} @@c"}
    document["properties"] |= {
        "description": "ours",
        "compute": None,
        "traffic": {"blue": 100},
        "mirrorTraffic": {},
        "publicNetworkAccess": "Disabled",
        "properties": {"own": "1"},
    }
    return clients


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "mine")


def section(**settings: str) -> AzureSection:
    poll = {"interval": 0.05, "deploy_timeout": 600}
    return AzureSection.model_validate(
        {"poll": poll, "endpoint": {"deadline": "3d", **settings}, "rollout": {"minutes": 0}}
    )


def endpoint(azure: Rehearsed) -> dict[str, Any]:
    found = azure.cloud.get(endpoint_id(azure.place, EP))
    assert found is not None
    return found


def traffic(azure: Rehearsed) -> dict[str, int]:
    return {name: n for name, n in endpoint(azure)["properties"]["traffic"].items() if n}


def stands(azure: Rehearsed) -> set[str]:
    return {str(doc["name"]) for doc in azure.cloud.children("/subscriptions", DEPLOYMENT_KIND)}


def hold(azure: Rehearsed, run: Run, coming: str = "", **settings: str) -> str:
    own = azure.ml.online_endpoints.get(EP)
    return hold_deadline(azure, section(**settings), run, own, no_progress, coming)


def settle(azure: Rehearsed, run: Run, refused: str = "", **settings: str) -> list[str]:
    return settle_removals(azure, section(**settings), run, EP, no_progress, refused=refused)


def advance(azure: Rehearsed, hours: float) -> list[str]:
    """Move the clock; the status of each run of the workflow."""
    body = json.dumps({"seconds": hours * HOUR}).encode()
    reply = answer(azure.cloud, Request("POST", "rehearsal.invalid", "/clock", {}, body))
    assert isinstance(reply.body, dict)
    return [run["status"] for run in reply.body["runs"]]


def move(azure: Rehearsed, shares: dict[str, int], tag: str | None = TAG) -> None:
    wanted = Wanted(shares, tags={"phi3_rollout": tag})
    set_traffic(azure, section(), EP, wanted, no_progress)


def arm(azure: Rehearsed, run: Run, tag: str = TAG) -> str:
    keeper = PutBackKeeper(azure, section(), run, EP, "green", no_progress)
    return keeper.arm({"blue": 100}, tag, 300)


# --- deployments without traffic ---


def test_a_deployment_that_failed_goes_by_itself(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "green")
    add_deployment(azure, EP, "green", OURS, "Failed")
    (told,) = settle(azure, run, refused="green")
    assert told.startswith("green has no traffic and deletes itself at 20")
    advance(azure, 0.9)
    assert stands(azure) == {"blue", "green"}
    assert advance(azure, 0.2) == ["Succeeded"]
    assert stands(azure) == {"blue"}
    assert traffic(azure) == {"blue": 100}


def test_an_old_one_goes_after_a_day_and_leaves_time_for_a_rollback(
    azure: Rehearsed, run: Run
) -> None:
    hold(azure, run, "green")
    move(azure, {"green": 100}, None)
    settle(azure, run)
    advance(azure, 23.9)
    assert stands(azure) == {"blue", "green"}
    advance(azure, 1)
    assert stands(azure) == {"green"}


def test_a_rollback_takes_it_off_the_list(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "green")
    move(azure, {"green": 100}, None)
    settle(azure, run)
    move(azure, {"blue": 100}, None)
    settle(azure, run)
    assert set(read_deadline(azure, EP).removals) == {"green"}
    advance(azure, 30)
    assert stands(azure) == {"blue"}


def test_one_that_has_traffic_is_never_deleted_whatever_the_list_says(
    azure: Rehearsed, run: Run
) -> None:
    """A rollback in the portal, of which phi3 knows nothing; and the endpoint's own deadline."""
    hold(azure, run, "green")
    move(azure, {"green": 100}, None)
    settle(azure, run)
    move(azure, {"blue": 100}, None)
    assert set(advance(azure, 30)) == {"Failed"}
    assert stands(azure) == {"blue", "green"}
    advance(azure, 43)
    assert azure.cloud.get(endpoint_id(azure.place, EP)) is None  # one failure stops no other


def test_killed_after_its_creation_it_goes_by_itself(azure: Rehearsed, run: Run) -> None:
    """Nobody is left to see whether it fails: 10 minutes of creation, an hour beside, an hour."""
    azure.cloud.delete(f"{endpoint_id(azure.place, 'ep')}/deployments/green")
    hold(azure, run, "green")
    add_deployment(azure, EP, "green", OURS)
    advance(azure, 2.1)
    assert stands(azure) == {"blue", "green"}
    advance(azure, 0.2)
    assert stands(azure) == {"blue"}


def test_none_keeps_it_to_the_deadline(azure: Rehearsed, run: Run) -> None:
    never = {"remove_failed_after": "none", "remove_unused_after": "none"}
    told = hold(azure, run, "green", **never)
    assert "without traffic deletes itself" not in told
    assert settle(azure, run, refused="green", **never) == []
    advance(azure, 71)
    assert stands(azure) == {"blue", "green"}


def test_without_a_deadline_the_rest_still_holds(azure: Rehearsed, run: Run) -> None:
    told = hold(azure, run, "green", deadline="none")
    assert told.startswith("no deadline")
    assert "one that fails or is worse after 1h, 3.67 USD (azure.endpoint.remove_failed" in told
    assert "an old one after 24h, 88.15 USD (azure.endpoint.remove_unused_after)" in told
    assert read_deadline(azure, EP).text().startswith("no deadline")
    advance(azure, 80)
    assert stands(azure) == {"blue"}


def test_what_it_costs_ends_with_the_deadline(azure: Rehearsed, run: Run) -> None:
    told = hold(azure, run, deadline="8h")
    assert "an old one after 24h or at the deadline, 29.38 USD" in told
    add_deployment(azure, EP, "old", OURS)
    told = "\n".join(settle(azure, run, deadline="8h"))
    assert re.search(r"old has no traffic and deletes itself at .* \(in (8 h|7 h 59 min)\)", told)


def test_extending_changes_nothing_else(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "green")
    arm(azure, run)
    before = read_deadline(azure, EP)
    extend_deadline(azure, section(), EP, dt.timedelta(hours=4), no_progress)
    after = read_deadline(azure, EP)
    assert (after.removals, after.put_back) == (before.removals, before.put_back)
    assert after.at is not None
    assert before.at is not None
    assert after.at - before.at == dt.timedelta(hours=4)


NOON = dt.datetime(2026, 11, 29, 12, tzinfo=dt.timezone.utc)


class Item:
    """A deployment as the SDK has it."""

    def __init__(self, name: str, state: str = "Succeeded", run: str | None = "mine") -> None:
        self.name: str | None = name
        self.provisioning_state = state
        self.tags: dict[str, str] | None = {"phi3_run": run} if run else None


@pytest.mark.parametrize(
    ("item", "known", "hours"),
    [
        (Item("d"), None, 24),
        (Item("d"), 2, 24),  # a new time with each change
        (Item("d", "Failed"), None, 1),
        (Item("d", "Failed"), 0.5, 0.5),  # no more time for one that failed before
        (Item("refused"), 5, 1),
        (Item("used"), 5, None),
        (Item("used", "Failed"), None, None),
        (Item("coming", "Failed"), 0.1, None),  # replaced now; its own entry is below
        (Item("d", run=None), None, None),  # not phi3's
        (Item("d", run="another"), None, None),
        (Item("d", run="another"), 3, 3),
    ],
)
def test_when_each_goes(item: Item, known: float | None, hours: float | None) -> None:
    name = str(item.name)
    times = {} if known is None else {name: NOON + dt.timedelta(hours=known)}
    now = Now([item], frozenset({"used"}), "coming", "refused")
    found = removals_of(section(), "mine", now, {**times, "gone": NOON}, NOON)
    coming = found.pop("coming")
    assert coming == NOON + dt.timedelta(hours=2, minutes=10)
    assert found == ({} if hours is None else {name: NOON + dt.timedelta(hours=hours)})


# --- a rollout that nobody ends ---


@pytest.mark.parametrize("shares", [HALF, {"blue": 75, "green": 25}, {"green": 100}])
def test_the_moved_clock_alone_puts_the_traffic_back(
    azure: Rehearsed, run: Run, shares: dict[str, int]
) -> None:
    """Also after the last step, as long as that was not judged."""
    hold(azure, run, "green")
    before = json.loads(json.dumps(endpoint(azure)))
    assert "Azure itself puts the traffic back to blue 100 % at 20" in arm(azure, run)
    move(azure, shares)

    advance(azure, 0.3)  # 5 minutes of the step and 20 for the change
    assert traffic(azure) == shares
    advance(azure, 0.2)

    after = endpoint(azure)
    assert traffic(azure) == {"blue": 100}
    assert after["tags"] == before["tags"]
    users = after["identity"]["userAssignedIdentities"]
    assert list(users) == list(before["identity"]["userAssignedIdentities"])
    for key in ("description", "compute", "publicNetworkAccess", "properties", "authMode"):
        assert after["properties"][key] == before["properties"][key]
    advance(azure, 3)
    assert stands(azure) == {"blue"}  # the new one took over nothing, and bills no more


@pytest.mark.parametrize("tag", [None, TAG.replace("T10", "T11")])
def test_a_rollout_that_was_ended_is_never_undone_by_what_is_left(
    azure: Rehearsed, run: Run, tag: str | None
) -> None:
    """Killed between the rollout's end and the change of the workflow; or the next one runs."""
    hold(azure, run, "green")
    arm(azure, run)
    move(azure, HALF)
    move(azure, {"green": 100}, tag)
    assert "Failed" in advance(azure, 3)  # green has traffic, so it is not deleted
    assert traffic(azure) == {"green": 100}


def test_what_cannot_be_taken_away_is_said_and_harms_nobody(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "green")
    arm(azure, run)
    move(azure, HALF)
    move(azure, {"green": 100}, None)
    azure.cloud.faults.add("PUT */Microsoft.Logic/* 403 code=ScopeLocked times=9")
    (told,) = settle(azure, run)
    assert "could not be changed" in told
    assert "It cannot undo this" in told
    advance(azure, 2)
    assert traffic(azure) == {"green": 100}


def test_the_end_of_a_rollout_takes_away_the_action_and_the_right(
    azure: Rehearsed, run: Run
) -> None:
    hold(azure, run, "green")
    arm(azure, run)
    assert read_deadline(azure, EP).put_back is not None
    assert len(roles(azure)) == 2
    move(azure, {"green": 100}, None)
    settle(azure, run)
    assert read_deadline(azure, EP).put_back is None
    assert roles(azure) == [endpoint_id(azure.place, EP)]


def roles(azure: Rehearsed) -> list[str]:
    found = azure.cloud.children("/subscriptions", "Microsoft.Authorization/roleAssignments")
    return [role["properties"]["scope"] for role in found]


def test_without_the_right_to_use_the_identity_it_is_not_called_safe(
    azure: Rehearsed, run: Run
) -> None:
    hold(azure, run, "green")
    azure.cloud.faults.add(f"PUT */{UAI}/*/roleAssignments/* 403 times=9")
    told = arm(azure, run)
    assert "NOBODY puts the traffic back before the next phi3 up" in told
    assert "User Access Administrator" in told
    assert read_deadline(azure, EP).put_back is None
    assert read_deadline(azure, EP).holds
    move(azure, HALF)
    assert "Failed" in advance(azure, 1)  # as Azure would, the rehearsed one refuses the PUT
    assert traffic(azure) == HALF


def test_its_identity_may_do_this_and_nothing_else(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "green")
    arm(azure, run)
    workflow = azure.cloud.get(workflow_id(azure.place, EP))
    assert workflow is not None
    token = token_for(azure.cloud, workflow["identity"]["principalId"], f"https://{ARM}")
    headers = {"authorization": f"Bearer {token}"}
    for method in ("PUT", "DELETE"):
        for arm_id in [key for key in azure.cloud.resources if "/onlineendpoints/chat" not in key]:
            reply = answer(azure.cloud, Request(method, ARM, arm_id, headers, b"{}"))
            assert reply.status == 403, arm_id
    body = {
        "identity": {"userAssignedIdentities": {azure.place.resource_id(UAI, "another-id"): {}}}
    }
    sent = Request("PUT", ARM, endpoint_id(azure.place, EP), headers, json.dumps(body).encode())
    assert "LinkedAuthorizationFailed" in str(answer(azure.cloud, sent).body)


def test_an_endpoint_of_somebody_else_gets_none(azure: Rehearsed, run: Run) -> None:
    endpoint(azure)["tags"] = {}
    assert "NOBODY puts the traffic back" in arm(azure, run)
    assert azure.cloud.get(workflow_id(azure.place, EP)) is None


def test_status_shows_what_happens_when(azure: Rehearsed, run: Run) -> None:
    """Also on a machine without the run folder."""
    hold(azure, run, "green")
    arm(azure, run)
    move(azure, HALF)
    add_deployment(azure, EP, "old", OURS)
    settle(azure, run)
    arm(azure, run)
    (found,) = [item for item in take_inventory(azure).endpoints if item.name == EP]
    told = "\n".join(found.lines())
    assert "if the rollout is not ended by then, its traffic goes back at 20" in told
    assert "deployment old, if it has no traffic then, deletes itself at 20" in told
    (bill,) = [bill for bill in take_inventory(azure).bills() if "deployment old" in bill.text]
    assert bill.until_deadline == pytest.approx(24 * 3.673, rel=0.01)
    move(azure, {"green": 100}, None)
    (found,) = [item for item in take_inventory(azure).endpoints if item.name == EP]
    assert "goes back" not in "\n".join(found.lines())  # without the tag it does nothing


def test_a_lost_laptops_down_leaves_no_role_behind(azure: Rehearsed, run: Run) -> None:
    hold(azure, run, "green")
    arm(azure, run)
    Found(azure).delete(no_progress, everything=False)
    assert azure.cloud.get(workflow_id(azure.place, EP)) is None
    assert roles(azure) == []
