"""The rehearsed Logic Apps: when a recurrence fires, what its identity may do, the moved clock."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trustme", reason="the extra `rehearsal` is not installed")

from phi3_rehearsal import endpoints, jobs, logic, resources, workspaces
from phi3_rehearsal.cloud import Cloud
from phi3_rehearsal.identity import CALLER, action_of, token_for
from phi3_rehearsal.logic import literal
from phi3_rehearsal.proxy import answer
from phi3_rehearsal.wire import ARM, ML, Reply, Request

GROUP = "/subscriptions/5ab5c817-0000-4000-8000-5ab5c8170000/resourceGroups/rg"
WORKSPACE = f"{GROUP}/providers/{ML}/workspaces/ws"
ENDPOINT = f"{WORKSPACE}/onlineEndpoints/one"
OTHER = f"{WORKSPACE}/onlineEndpoints/other"
WORKFLOW = f"{GROUP}/providers/{logic.KIND}/one-deadline"
# "AzureML Data Scientist", as "Azure built-in roles" has it.
DATA_SCIENTIST = "f6c7c914-8db3-469d-8ca1-694a8f32e121"
HOUR = 3600.0
SERVICES = (resources,)  # importing a service's module declares its calls


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    cloud = Cloud(tmp_path)
    body = {"location": "eastus", "properties": {"provisioningState": "Succeeded"}}
    cloud.put(GROUP, "Microsoft.Resources/resourceGroups", body)
    cloud.put(WORKSPACE, workspaces.KIND, {**body, "kind": "Default"})
    for arm_id in (ENDPOINT, OTHER):
        cloud.put(arm_id, endpoints.KIND, json.loads(json.dumps(body)))
    return cloud


def call(
    cloud: Cloud, method: str, path: str, body: Any = None, *, host: str = ARM, who: str = CALLER
) -> Reply:
    token = token_for(cloud, who, f"https://{ARM}")
    headers = {"authorization": f"Bearer {token}"}
    return answer(cloud, Request(method, host, path, headers, json.dumps(body or {}).encode()))


def at(cloud: Cloud, hours: float) -> str:
    when = dt.datetime.fromtimestamp(cloud.time() + hours * HOUR, dt.timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def make_workflow(cloud: Cloud, *, asynchronous: bool = False, **recurrence: str) -> str:
    """The workflow of an endpoint; the id of its identity."""
    action: dict[str, Any] = {
        "type": "Http",
        "inputs": {
            "method": "DELETE",
            "uri": f"https://{ARM}{ENDPOINT}?api-version=2025-12-01",
            "authentication": {
                "type": "ManagedServiceIdentity",
                "audience": "https://management.core.windows.net/",
            },
        },
    }
    if not asynchronous:
        action["operationOptions"] = "DisableAsyncPattern"
    every = {"frequency": "Hour", "interval": 1, **recurrence}
    definition = {
        "$schema": "https://schema.management.azure.com/…/workflowdefinition.json#",
        "triggers": {"deadline": {"type": "Recurrence", "recurrence": every}},
        "actions": {"delete_endpoint": action},
    }
    body = {
        "location": "eastus",
        "identity": {"type": "SystemAssigned"},
        "properties": {"definition": definition},
    }
    made = call(cloud, "PUT", WORKFLOW, body)
    assert made.status in (200, 201), made.body
    assert isinstance(made.body, dict)
    return str(made.body["identity"]["principalId"])


def assign(cloud: Cloud, principal: str) -> None:
    guid = "00000000-0000-4000-8000-000000000001"
    path = f"{ENDPOINT}/providers/Microsoft.Authorization/roleAssignments/{guid}"
    properties = {
        "roleDefinitionId": f"/x/roleDefinitions/{DATA_SCIENTIST}",
        "principalId": principal,
        "principalType": "ServicePrincipal",
    }
    assert call(cloud, "PUT", path, {"properties": properties}).status == 201


def advance(cloud: Cloud, hours: float) -> list[dict[str, Any]]:
    reply = call(cloud, "POST", "/clock", {"seconds": hours * HOUR}, host="rehearsal.invalid")
    assert isinstance(reply.body, dict)
    runs: list[dict[str, Any]] = reply.body["runs"]
    return runs


def test_it_fires_at_its_time_and_every_hour_until_its_end(cloud: Cloud) -> None:
    principal = make_workflow(cloud, startTime=at(cloud, 8), endTime=at(cloud, 10.5))
    assign(cloud, principal)
    assert advance(cloud, 7.9) == []
    assert cloud.get(ENDPOINT) is not None
    assert [run["status"] for run in advance(cloud, 0.2)] == ["Succeeded"]
    assert cloud.get(ENDPOINT) is None
    assert len(advance(cloud, 100)) == 2
    assert cloud.get(OTHER) is not None


def test_without_a_start_time_it_fires_at_once(cloud: Cloud) -> None:
    make_workflow(cloud)
    runs = call(cloud, "GET", f"{WORKFLOW}/runs").body
    assert isinstance(runs, dict)
    assert len(runs["value"]) == 1


def test_a_start_time_in_the_past_is_the_next_slot(cloud: Cloud) -> None:
    make_workflow(cloud, startTime=at(cloud, -2.5))
    trigger = call(cloud, "GET", f"{WORKFLOW}/triggers/deadline").body
    assert isinstance(trigger, dict)
    shown = dt.datetime.fromisoformat(trigger["properties"]["nextExecutionTime"])
    assert 0.4 < (shown.timestamp() - cloud.time()) / HOUR < 0.6


def test_without_a_role_it_deletes_nothing(cloud: Cloud) -> None:
    make_workflow(cloud, startTime=at(cloud, 1))
    assert [run["status"] for run in advance(cloud, 1.5)] == ["Failed"]
    assert cloud.get(ENDPOINT) is not None


def test_polling_an_operation_is_beyond_the_role(cloud: Cloud) -> None:
    assign(cloud, make_workflow(cloud, asynchronous=True, startTime=at(cloud, 1)))
    assert [run["status"] for run in advance(cloud, 1.5)] == ["Failed"]
    assert cloud.get(ENDPOINT) is None  # it was deleted, and the run says that it was not


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", OTHER),
        ("DELETE", WORKSPACE),
        ("DELETE", GROUP),
        ("DELETE", WORKFLOW),
        ("DELETE", f"{WORKSPACE}/computes/gpu-cluster"),
        ("POST", f"{OTHER}/listKeys"),
        ("PUT", f"{ENDPOINT}/providers/Microsoft.Authorization/roleAssignments/{'0' * 8}"),
    ],
)
def test_the_role_on_one_endpoint_allows_nothing_else(cloud: Cloud, method: str, path: str) -> None:
    principal = make_workflow(cloud, startTime=at(cloud, 1))
    assign(cloud, principal)
    assert call(cloud, method, path, who=principal).status == 403
    assert call(cloud, "GET", ENDPOINT, who=principal).status == 200


def test_an_identity_stays_until_its_workflow_is_deleted(cloud: Cloud) -> None:
    first = make_workflow(cloud, startTime=at(cloud, 1))
    assert make_workflow(cloud, startTime=at(cloud, 2)) == first
    assert call(cloud, "DELETE", WORKFLOW).status == 200
    assert make_workflow(cloud, startTime=at(cloud, 1)) != first


def test_a_refusal_is_repeated_the_next_hour(cloud: Cloud) -> None:
    assign(cloud, make_workflow(cloud, startTime=at(cloud, 1)))
    cloud.faults.add("DELETE */onlineEndpoints/one 409")
    assert [run["status"] for run in advance(cloud, 1.5)] == ["Failed"]
    assert [run["status"] for run in advance(cloud, 1)] == ["Succeeded"]
    assert cloud.get(ENDPOINT) is None


DUE = "@greaterOrEquals(ticks(utcNow()), ticks('{}'))"


def guarded(cloud: Cloud, action: dict[str, Any], hours: float, **more: Any) -> dict[str, Any]:
    expression = DUE.format(at(cloud, hours))
    return {"type": "If", "expression": expression, "actions": {"now": action}, **more}


def request(method: str, path: str, **inputs: Any) -> dict[str, Any]:
    signed = {"type": "ManagedServiceIdentity", "audience": f"https://{ARM}"}
    uri = f"https://{ARM}{path}?api-version=2025-12-01"
    inputs = {"method": method, "uri": uri, "authentication": signed, **inputs}
    return {"type": "Http", "operationOptions": "DisableAsyncPattern", "inputs": inputs}


def put_actions(cloud: Cloud, **actions: Any) -> Reply:
    every = {"frequency": "Hour", "interval": 1, "startTime": at(cloud, 1)}
    definition = {
        "$schema": "https://schema.management.azure.com/…/workflowdefinition.json#",
        "triggers": {"hourly": {"type": "Recurrence", "recurrence": every}},
        "actions": actions,
    }
    body = {"identity": {"type": "SystemAssigned"}, "properties": {"definition": definition}}
    return call(cloud, "PUT", WORKFLOW, {"location": "eastus", **body})


def principal_of(reply: Reply) -> str:
    assert isinstance(reply.body, dict), reply.body
    return str(reply.body["identity"]["principalId"])


def test_a_condition_on_the_time_holds_from_then_on(cloud: Cloud) -> None:
    made = put_actions(cloud, first=guarded(cloud, request("DELETE", ENDPOINT), 2.5))
    assign(cloud, principal_of(made))
    assert [run["status"] for run in advance(cloud, 2.2)] == ["Succeeded"] * 2
    assert cloud.get(ENDPOINT) is not None
    advance(cloud, 1)
    assert cloud.get(ENDPOINT) is None


def test_one_that_fails_does_not_stop_what_runs_after_it(cloud: Cloud) -> None:
    after = {"runAfter": {"first": ["Succeeded", "Failed", "TimedOut", "Skipped"]}}
    other = guarded(cloud, request("DELETE", OTHER), 0)
    mine = guarded(cloud, request("DELETE", ENDPOINT), 0, **after)
    mine["actions"] = {"also": mine["actions"]["now"]}
    assign(cloud, principal_of(put_actions(cloud, first=other, second=mine)))
    assert [run["status"] for run in advance(cloud, 1.5)] == ["Failed"]
    assert (cloud.get(OTHER) is None, cloud.get(ENDPOINT) is None) == (False, True)


@pytest.mark.parametrize(("tag", "gone"), [("it's", True), ("another", False), (None, False)])
def test_a_condition_on_a_tag_of_what_was_read(cloud: Cloud, tag: str | None, gone: bool) -> None:
    doc = cloud.get(ENDPOINT)
    assert doc is not None
    doc["tags"] = {"phi3_rollout": tag} if tag else {}
    only_if = {
        "type": "If",
        "expression": "@equals(body('read')?['tags']?['phi3_rollout'], 'it''s')",
        "actions": {"go": request("DELETE", ENDPOINT)},
        "runAfter": {"read": ["Succeeded"]},
    }
    assign(cloud, principal_of(put_actions(cloud, read=request("GET", ENDPOINT), only=only_if)))
    advance(cloud, 1.5)
    assert (cloud.get(ENDPOINT) is None) == gone


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ({"type": "If", "expression": "@less(1, 2)", "actions": {}}, "NotRehearsed"),
        ({"type": "If", "expression": {"and": []}, "actions": {}}, "NotRehearsed"),
        ({"type": "If", "expression": DUE.format("soon"), "actions": {}}, "InvalidTemplate"),
        ({"type": "Until"}, "NotRehearsed"),
        (request("PUT", ENDPOINT, body={"tags": {"x": "@utcNow()"}}), "NotRehearsed"),
        (request("PUT", ENDPOINT, body={"tags": ["at @{utcNow()}"]}), "NotRehearsed"),
        ({**request("GET", ENDPOINT), "runAfter": {"nobody": ["Succeeded"]}}, "InvalidTemplate"),
    ],
)
def test_what_is_not_rehearsed_is_said(cloud: Cloud, action: dict[str, Any], code: str) -> None:
    reply = put_actions(cloud, first=action)
    assert isinstance(reply.body, dict)
    assert reply.body["error"]["code"] == code
    assert reply.status == (501 if code == "NotRehearsed" else 400)


def test_a_doubled_at_is_sent_as_one() -> None:
    text = {"a": "@@team", "b": "x@y @@{z}", "c": "@@{z}"}
    assert literal(text) == {"a": "@team", "b": "x@y @{z}", "c": "@{z}"}


def test_idle_nodes_go_by_the_moved_clock(cloud: Cloud) -> None:
    cluster = f"{WORKSPACE}/computes/gpu-cluster"
    properties = {"status": "Completed", "computeId": cluster}
    ended = {"_times": {"end": at(cloud, 0)}}
    cloud.put(f"{WORKSPACE}/jobs/done", jobs.KIND, {"properties": properties, **ended})
    assert jobs.nodes_of_ended_jobs(cloud, cluster, 120) == 1
    advance(cloud, 0.1)
    assert jobs.nodes_of_ended_jobs(cloud, cluster, 120) == 0


def test_actions_are_named_as_roles_name_them() -> None:
    assert action_of("DELETE", ENDPOINT) == f"{ML}/workspaces/onlineEndpoints/delete"
    assert action_of("POST", f"{WORKSPACE}/listKeys") == f"{ML}/workspaces/listKeys/action"
    assert action_of("PUT", GROUP) == "Microsoft.Resources/subscriptions/resourceGroups/write"
