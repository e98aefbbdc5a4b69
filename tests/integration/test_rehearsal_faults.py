"""Injected faults reach the unmodified SDKs as Azure's own would, and are over when they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
from tests.integration.rehearsal_fixture import A100, REGION, Azure

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.ai.ml import MLClient, command
from azure.ai.ml.entities import AmlCompute, Environment, ManagedOnlineDeployment
from azure.core.exceptions import HttpResponseError, ResourceExistsError, ServiceResponseError

from phi3_rehearsal.faults import Faults

pytest_plugins = (
    "tests.integration.server_plugin",
    "tests.integration.rehearsal_plugin",
)


@pytest.fixture(scope="module")
def ml(azure: Azure) -> MLClient:
    return azure.ml(retry_backoff_factor=0.05)


@pytest.fixture(autouse=True)
def no_faults_left(azure: Azure) -> Iterator[None]:
    yield
    faults = Faults(azure.rehearsal.folder / "faults.json")
    left = faults.pending()
    faults.clear()
    assert left == []


def statuses(azure: Azure, method: str, ending: str) -> list[Any]:
    """How the calls to one resource ended, in their order."""
    return [
        call["status"]
        for call in azure.rehearsal.calls()
        if call["method"] == method and call["path"].endswith(ending)
    ]


def cluster(name: str) -> AmlCompute:
    return AmlCompute(name=name, size=A100, max_instances=1)


def test_a_throttled_call_is_repeated(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("PUT */computes/throttled 429 retry-after=1 times=2")
    ml.compute.begin_create_or_update(cluster("throttled")).result()
    assert statuses(azure, "PUT", "/computes/throttled") == [429, 429, 201]


def test_an_error_of_the_service_is_repeated(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("PUT */computes/shaky 500")
    azure.rehearsal.fault("GET */operationsStatus/* 503")
    ml.compute.begin_create_or_update(cluster("shaky")).result()
    assert statuses(azure, "PUT", "/computes/shaky") == [500, 201]


def test_a_conflict_is_reported(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("PUT */computes/busy 409 code=ResourceOperationInProgress")
    with pytest.raises(ResourceExistsError, match="ResourceOperationInProgress"):
        ml.compute.begin_create_or_update(cluster("busy")).result()
    assert azure.call("GET", f"{azure.workspace}/computes/busy").status_code == 404


def test_a_connection_that_breaks_before_nothing_happened(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("PUT */computes/cut reset")
    ml.compute.begin_create_or_update(cluster("cut")).result()
    assert statuses(azure, "PUT", "/computes/cut") == ["reset", 201]


def test_a_lost_answer_makes_no_second_job(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("PUT */jobs/once reset-after")
    job = command(
        name="once",
        command="true",
        environment=Environment(image="mcr.microsoft.com/azureml/any:1"),
        compute="throttled",
    )
    assert ml.jobs.create_or_update(job).name == "once"
    assert statuses(azure, "PUT", "/jobs/once") == ["201 answer lost", 200]
    ml.jobs.stream("once")
    assert ml.jobs.get("once").status == "Completed"


def test_a_lost_answer_of_a_post_is_not_repeated(azure: Azure) -> None:
    path = f"{azure.workspace}/datastores/workspaceblobstore/listSecrets"
    azure.rehearsal.fault("POST */listSecrets reset-after")
    with pytest.raises(requests.ConnectionError):
        azure.call("POST", path, {})
    assert azure.call("POST", path, {}).status_code == 200


def test_a_poll_that_finds_nothing_leaves_what_was_made(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("GET */operationsStatus/* lost")
    azure.rehearsal.fault("* */computes/unseen slow seconds=1")
    with pytest.raises(HttpResponseError):
        ml.compute.begin_create_or_update(cluster("unseen")).result()
    assert azure.call("GET", f"{azure.workspace}/computes/unseen").status_code == 200


def test_a_failed_cluster_remains(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("PUT */computes/broken failed code=NodesLost")
    with pytest.raises(HttpResponseError) as caught:
        ml.compute.begin_create_or_update(cluster("broken")).result()
    assert caught.value.error is not None
    assert caught.value.error.code == "NodesLost"
    found = azure.call("GET", f"{azure.workspace}/computes/broken").json()
    assert found["properties"]["provisioningState"] == "Failed"
    ml.compute.begin_delete("broken").result()


def test_a_job_fails_on_demand(azure: Azure, ml: MLClient) -> None:
    azure.rehearsal.fault("PUT */jobs/doomed failed code=OutOfMemory message='no room'")
    job = command(
        name="doomed",
        command="true",
        environment=Environment(image="mcr.microsoft.com/azureml/any:1"),
        compute="throttled",
    )
    ml.jobs.create_or_update(job)
    with pytest.raises(Exception, match="no room"):
        ml.jobs.stream("doomed")


def endpoint(azure: Azure, name: str, identity: dict[str, Any] | None = None) -> None:
    body: dict[str, Any] = {"location": REGION, "properties": {"authMode": "Key"}}
    if identity:
        body["identity"] = identity
    path = f"{azure.workspace}/onlineEndpoints/{name}"
    assert azure.call("PUT", path, body).status_code == 201


def deployment(name: str) -> ManagedOnlineDeployment:
    return ManagedOnlineDeployment(
        name="blue",
        endpoint_name=name,
        model="azureml://registries/azureml/models/Phi-4-mini-instruct/versions/1",
        instance_type=A100,
        instance_count=1,
    )


def wait_for(azure: Azure, path: str) -> None:
    """Until the endpoint is ready; its operation takes no time of its own."""
    assert azure.call("GET", f"{azure.workspace}/usages").status_code == 501  # settles operations
    for _ in range(50):
        state = azure.call("GET", path).json()["properties"]["provisioningState"]
        if state == "Succeeded":
            return
    pytest.fail(f"{path} is {state}")


def test_a_deployment_that_fails_keeps_its_log(azure: Azure, ml: MLClient) -> None:
    endpoint(azure, "chat-fails")
    wait_for(azure, f"{azure.workspace}/onlineEndpoints/chat-fails")
    azure.rehearsal.fault("PUT */onlineEndpoints/*/deployments/* failed code=ResourceNotReady")
    with pytest.raises(HttpResponseError) as caught:
        ml.online_deployments.begin_create_or_update(deployment("chat-fails")).result()
    assert caught.value.error is not None
    assert caught.value.error.code == "ResourceNotReady"
    assert ml.online_deployments.get("blue", "chat-fails").provisioning_state == "Failed"
    assert "injected" in ml.online_deployments.get_logs("blue", "chat-fails", lines=5)


def test_an_identity_without_its_roles_cannot_deploy(azure: Azure, ml: MLClient) -> None:
    identity = f"{azure.group}/providers/Microsoft.ManagedIdentity/userAssignedIdentities/uai-bare"
    assert azure.call("PUT", identity, {"location": REGION}).status_code == 201
    users = {"type": "UserAssigned", "userAssignedIdentities": {identity: {}}}
    endpoint(azure, "chat-bare", users)
    wait_for(azure, f"{azure.workspace}/onlineEndpoints/chat-bare")
    with pytest.raises(HttpResponseError) as caught:
        ml.online_deployments.begin_create_or_update(deployment("chat-bare")).result()
    assert caught.value.error is not None
    assert "lacks the role AcrPull" in str(caught.value.error.message)


def test_retries_end(azure: Azure) -> None:
    azure.rehearsal.fault("GET */computes 503 times=2")
    with pytest.raises((HttpResponseError, ServiceResponseError)):
        list(azure.ml(retry_total=1, retry_backoff_factor=0.05).compute.list())
