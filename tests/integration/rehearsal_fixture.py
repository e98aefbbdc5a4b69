"""A workspace in a rehearsed Azure and the SDKs' clients, for tests (see `rehearsal_plugin`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import requests

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.ai.ml import MLClient

from phi3_rehearsal import Rehearsal

ARM = "https://management.azure.com"
GROUP, WORKSPACE, REGION = "rg-tests", "ws-tests", "eastus"
ML = "Microsoft.MachineLearningServices"
A100 = "Standard_NC24ads_A100_v4"


@dataclass
class Azure:
    """The rehearsal and what talks to it."""

    rehearsal: Rehearsal
    credential: Any
    subscription: str

    @property
    def group(self) -> str:
        """The id of the resource group."""
        return f"/subscriptions/{self.subscription}/resourceGroups/{GROUP}"

    @property
    def workspace(self) -> str:
        """The id of the workspace."""
        return f"{self.group}/providers/{ML}/workspaces/{WORKSPACE}"

    @property
    def storage(self) -> str:
        """The id of the storage account."""
        return f"{self.group}/providers/Microsoft.Storage/storageAccounts/sttests"

    @property
    def registry(self) -> str:
        """The id of the container registry."""
        return f"{self.group}/providers/Microsoft.ContainerRegistry/registries/crtests"

    def ml(self, **more: Any) -> MLClient:
        """The SDK's client of the workspace."""
        more = {"polling_interval": 0.2, **more}
        return MLClient(self.credential, self.subscription, GROUP, WORKSPACE, **more)

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> requests.Response:
        """A call of the resource manager by hand."""
        token = self.credential.get_token(f"{ARM}/.default").token
        headers = {"Authorization": f"Bearer {token}"}
        query = {"api-version": "2024-04-01"}
        return requests.request(
            method, ARM + path, json=body, headers=headers, params=query, timeout=60, **more
        )

    def code(self, answer: requests.Response) -> str:
        """The error code of an answer."""
        return str(answer.json()["error"]["code"])


def provision(azure: Azure) -> None:
    """The group, what a workspace stands on, and the workspace."""
    parts = f"{azure.group}/providers"
    vault = f"{parts}/Microsoft.KeyVault/vaults/kv-tests"
    insights = f"{parts}/Microsoft.Insights/components/appi-tests"
    for path in (azure.group, azure.storage, azure.registry, vault, insights):
        answer = azure.call("PUT", path, {"location": REGION, "properties": {}})
        assert answer.status_code == 201, answer.text
    properties = {
        "storageAccount": azure.storage,
        "keyVault": vault,
        "applicationInsights": insights,
        "containerRegistry": azure.registry,
    }
    body = {"location": REGION, "kind": "Default", "properties": properties}
    assert azure.call("PUT", azure.workspace, body).status_code == 201
    # Room for the idle nodes and deployments of all tests that share this Azure.
    quota = (
        f"{azure.group.partition('/resourceGroups/')[0]}/providers/{ML}/locations/{REGION}"
        "/providers/Microsoft.Quota/quotas/standardNCADSA100v4Family"
    )
    limit = {"properties": {"limit": {"limitObjectType": "LimitValue", "value": 400}}}
    assert azure.call("PUT", quota, limit).status_code == 200
