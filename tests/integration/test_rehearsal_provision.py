"""The unmodified SDKs build a workplace in the rehearsed Azure; it refuses what Azure refuses."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import requests
from tests.integration.rehearsal_fixture import A100, GROUP, ML, REGION, WORKSPACE, Azure

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.ai.ml import MLClient
from azure.ai.ml.entities import AmlCompute, Hub, Project, Workspace
from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceNotFoundError
from azure.mgmt.authorization import AuthorizationManagementClient
from azure.mgmt.authorization.models import RoleAssignmentCreateParameters
from azure.mgmt.msi import ManagedServiceIdentityClient
from azure.mgmt.quota import QuotaMgmtClient
from azure.mgmt.resource.resources import ResourceManagementClient
from azure.storage.blob import BlobServiceClient

pytest_plugins = (
    "tests.integration.server_plugin",
    "tests.integration.rehearsal_plugin",
)
ACR_PULL = "7f951dda-4ed3-4680-a7ca-43fe172d538d"


def test_a_group_keeps_its_region(azure: Azure) -> None:
    groups = ResourceManagementClient(azure.credential, azure.subscription).resource_groups
    made = groups.create_or_update("rg-other", {"location": "westus3", "tags": {"a": "b"}})
    assert made.id == f"/subscriptions/{azure.subscription}/resourceGroups/rg-other"
    assert groups.create_or_update("rg-other", {"location": "westus3"}).location == "westus3"
    with pytest.raises(ResourceExistsError, match="already exists"):
        groups.create_or_update("rg-other", {"location": "eastus"})
    with pytest.raises(HttpResponseError, match="not available"):
        groups.create_or_update("rg-third", {"location": "atlantis"})
    groups.begin_delete("rg-other").result()
    assert not groups.check_existence("rg-other")


def test_the_sdk_makes_a_workspace_and_again_changes_nothing(azure: Azure) -> None:
    client = MLClient(azure.credential, azure.subscription, GROUP)
    existing = client.workspaces.get(WORKSPACE)
    assert existing.discovery_url == f"https://{REGION}.api.azureml.ms/discovery"
    parts = {"storage_account": azure.storage, "key_vault": existing.key_vault}
    wanted = Workspace(name="ws-second", location=REGION, **parts)
    made = client.workspaces.begin_create(wanted).result()
    assert made.storage_account == azure.storage
    again = client.workspaces.begin_create(wanted).result()
    assert again.discovery_url == made.discovery_url
    names = [workspace.name for workspace in client.workspaces.list()]
    assert names.count("ws-second") == 1
    client.workspaces.begin_delete(
        "ws-second", delete_dependent_resources=False, permanently_delete=True
    ).result()
    assert "ws-second" not in [workspace.name for workspace in client.workspaces.list()]


def test_a_project_belongs_to_a_hub_of_its_region(azure: Azure) -> None:
    parts = {"storageAccount": azure.storage}
    parts["keyVault"] = f"{azure.group}/providers/Microsoft.KeyVault/vaults/kv-tests"
    base = f"{azure.group}/providers/{ML}/workspaces"
    hub = azure.call(
        "PUT", f"{base}/hub-a", {"location": REGION, "kind": "Hub", "properties": parts}
    )
    assert hub.status_code == 201
    body = {
        "location": "westus3",
        "kind": "Project",
        "properties": {"hubResourceId": f"{base}/hub-a"},
    }
    assert azure.call("PUT", f"{base}/project-a", body).status_code == 400
    assert azure.call("PUT", f"{base}/project-a", {**body, "location": REGION}).status_code == 201
    client = MLClient(azure.credential, azure.subscription, GROUP)
    assert isinstance(client.workspaces.get("hub-a"), Hub)
    project = client.workspaces.get("project-a")
    assert isinstance(project, Project)
    assert project.storage_account == azure.storage
    refused = azure.call("DELETE", f"{base}/hub-a")
    assert refused.status_code == 409
    assert "project-a" in refused.text


def test_a_storage_account_takes_its_files_along(azure: Azure) -> None:
    account = f"{azure.group}/providers/Microsoft.Storage/storageAccounts/stgone"
    body = {"location": REGION, "properties": {}}
    assert azure.call("PUT", account, body).status_code == 201
    client = BlobServiceClient("https://stgone.blob.core.windows.net", azure.credential)
    box = client.get_container_client("box")
    box.create_container()
    parts = b"0123456789" * 1000
    box.upload_blob("deep/a.bin", parts, max_concurrency=2, metadata={"made": "here"})
    assert box.download_blob("deep/a.bin", offset=5, length=10).readall() == b"5678901234"
    assert box.get_blob_client("deep/a.bin").get_blob_properties().metadata == {"made": "here"}
    assert [blob.name for blob in box.list_blobs(name_starts_with="deep/")] == ["deep/a.bin"]
    with pytest.raises(ResourceExistsError):
        box.upload_blob("deep/a.bin", b"other")
    listed = ResourceManagementClient(azure.credential, azure.subscription).resources
    names = [item.name for item in listed.list_by_resource_group(GROUP)]
    assert "stgone" in names
    assert azure.call("DELETE", account).status_code == 200
    with pytest.raises(ResourceNotFoundError):
        list(box.list_blobs())
    assert azure.call("PUT", account, body).status_code == 201
    assert list(box.list_blobs()) == []


def test_what_is_deleted_softly_keeps_its_name(azure: Azure) -> None:
    vault = f"{azure.group}/providers/Microsoft.KeyVault/vaults/kv-gone"
    body: dict[str, Any] = {"location": REGION, "properties": {}}
    assert azure.call("PUT", vault, body).status_code == 201
    assert azure.call("DELETE", vault).status_code == 200
    again = azure.call("PUT", vault, body)
    assert (again.status_code, azure.code(again)) == (409, "ConflictError")
    body["properties"] = {"createMode": "recover"}
    assert azure.call("PUT", vault, body).status_code == 201


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("Microsoft.Storage/storageAccounts/With-Dash", "AccountNameInvalid"),
        (f"{ML}/workspaces/ws", "ValidationError"),
        ("Microsoft.ManagedIdentity/userAssignedIdentities/a.b", "InvalidResourceName"),
    ],
)
def test_names_against_the_rules_are_refused(azure: Azure, path: str, code: str) -> None:
    body = {"location": REGION, "properties": {}}
    answer = azure.call("PUT", f"{azure.group}/providers/{path}", body)
    assert (answer.status_code, azure.code(answer)) == (400, code)


def test_roles_are_assigned_once(azure: Azure) -> None:
    identities = ManagedServiceIdentityClient(azure.credential, azure.subscription)
    identity = identities.user_assigned_identities.create_or_update(
        GROUP, "uai-roles", {"location": REGION}
    )
    roles = AuthorizationManagementClient(azure.credential, azure.subscription).role_assignments
    definition = f"{azure.group}/providers/Microsoft.Authorization/roleDefinitions/{ACR_PULL}"
    wanted = RoleAssignmentCreateParameters(
        role_definition_id=definition,
        principal_id=identity.principal_id,
        principal_type="ServicePrincipal",
    )
    name = str(uuid.uuid5(uuid.NAMESPACE_URL, "one"))
    first = roles.create(azure.registry, name, wanted)
    assert first.principal_type == "ServicePrincipal"
    assert roles.create(azure.registry, name, wanted).id == first.id
    with pytest.raises(ResourceExistsError, match="RoleAssignmentExists"):
        roles.create(azure.registry, str(uuid.uuid4()), wanted)
    with pytest.raises(HttpResponseError, match="must be a GUID"):
        roles.create(azure.registry, "no-guid", wanted)
    wanted.principal_type = None  # the SDK then says "User"
    with pytest.raises(HttpResponseError, match="UnmatchedPrincipalType"):
        roles.create(azure.storage, name, wanted)
    found = roles.list_for_scope(azure.registry, filter=f"principalId eq '{identity.principal_id}'")
    assert [item.name for item in found] == [name]
    roles.delete(azure.registry, name)


def test_clusters_sizes_and_quota(azure: Azure) -> None:
    ml = azure.ml()
    cluster = AmlCompute(name="gpu", size=A100, min_instances=0, max_instances=1)
    made = ml.compute.begin_create_or_update(cluster).result()
    assert (made.provisioning_state, made.size) == ("Succeeded", A100.upper())
    refused = [("Standard_NC24rs_v3", 1, "not supported"), (A100, 17, "ClusterCoreQuotaReached")]
    for size, count, message in refused:
        other = AmlCompute(name="other", size=size, max_instances=count)
        with pytest.raises(HttpResponseError, match=message):
            ml.compute.begin_create_or_update(other).result()
    sizes = {size.name: size.gpus for size in ml.compute.list_sizes(location=REGION)}
    assert sizes["Standard_NC48ads_A100_v4"] == 2
    limits = {usage.name["value"]: usage.limit for usage in ml.compute.list_usage(location=REGION)}
    assert limits["standardNDSH100v5Family"] == 0
    scope = f"subscriptions/{azure.subscription}/providers/{ML}/locations/{REGION}"
    quota = QuotaMgmtClient(azure.credential, azure.subscription).quota
    body: Any = {"properties": {"limit": {"limitObjectType": "LimitValue", "value": 96}}}
    granted = quota.begin_create_or_update("standardNDSH100v5Family", scope, body).result()
    assert granted.properties.limit.value == 96
    body["properties"]["limit"]["value"] = 4000
    with pytest.raises(HttpResponseError, match="support request"):
        quota.begin_create_or_update("standardNDSH100v5Family", scope, body).result()
    body["properties"]["limit"]["value"] = 0
    quota.begin_create_or_update("standardNDSH100v5Family", scope, body).result()


def test_the_registry_lists_models_and_the_component(azure: Azure) -> None:
    registry = MLClient(azure.credential, registry_name="azureml")
    model = registry.models.get("Phi-4-mini-instruct", label="latest")
    assert "learning_rate_max" in model.tags["model_specific_defaults"]
    component = registry.components.get("chat_completion_pipeline", label="latest")
    assert len(component.inputs) == 69
    assert registry.models.get("Phi-3-mini-4k-instruct", version="15").version == "15"
    with pytest.raises(Exception, match="does not exist in registry"):  # archived: not listed
        registry.models.get("Phi-3-mini-4k-instruct", label="latest")


def test_a_token_for_another_service_is_refused(azure: Azure) -> None:
    token = azure.credential.get_token("https://storage.azure.com/.default").token
    answer = requests.get(
        f"https://management.azure.com{azure.workspace}",
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    assert answer.status_code == 401
    assert "audience" in answer.text
    assert (
        requests.get(f"https://management.azure.com{azure.workspace}", timeout=30).status_code
        == 401
    )


def test_what_is_not_rehearsed_says_so(azure: Azure) -> None:
    answer = requests.get("https://example.org/any/where?secret=abc", timeout=30)
    assert answer.status_code == 501
    assert answer.json()["error"]["message"].endswith("GET https://example.org/any/where")
