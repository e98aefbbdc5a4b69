"""Provisioning: a workspace that is being deleted does not count, and what is said to bill does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from phi3_training.errors import StageError
from phi3_training.recipe.azure import AzureSection
from phi3_training.targets.azure.provision import ensure_cluster, is_provisioned

from .azure_wire import Answer, Wire, clients

A100 = "Standard_NC24ads_A100_v4"


def _workspace(state: str) -> Any:
    def answer(_method: str, url: str) -> Answer:
        if "/workspaces/phi3-workspace?" not in url:
            return 404, {"error": {"code": "ResourceNotFound", "message": url}}
        name = "phi3-workspace"
        properties = {"provisioningState": state, "storageAccount": "/s", "keyVault": "/k"}
        body = {"id": url.split("?")[0].partition("azure.com")[2], "name": name}
        return 200, {**body, "location": "eastus", "kind": "Default", "properties": properties}

    return answer


@pytest.mark.parametrize(("state", "stands"), [("Succeeded", True), ("Deleting", False)])
def test_a_workspace_that_is_being_deleted_does_not_count(
    tmp_path: Path, state: str, stands: bool
) -> None:
    made = clients(Wire(_workspace(state)), tmp_path)
    assert is_provisioned(made, AzureSection(), parts=["workspace"]) is stands


@pytest.mark.parametrize(
    ("exists", "said"),
    [(False, "No cluster was created: nothing bills"), (True, "stays until it is deleted")],
)
def test_a_refused_cluster_bills_only_where_it_exists(
    tmp_path: Path, exists: bool, said: str
) -> None:
    made: list[str] = []

    def answer(method: str, url: str) -> Answer:
        if "/vmSizes" in url:
            size = {"name": A100, "vCPUs": 24, "gpus": 1, "family": "standardNCADSA100v4Family"}
            return 200, {"value": [size]}
        if method == "PUT":
            made.append(url)
            return 400, {"error": {"code": "ClusterCoreQuotaReached", "message": "too few"}}
        if exists and made:
            properties = {"computeType": "AmlCompute", "provisioningState": "Failed"}
            inner = {"vmSize": A100, "scaleSettings": {"maxNodeCount": 1, "minNodeCount": 0}}
            return 200, {"name": "gpu-cluster", "properties": {**properties, "properties": inner}}
        return 404, {"error": {"code": "ResourceNotFound", "message": "no cluster"}}

    with pytest.raises(StageError, match="ClusterCoreQuotaReached") as caught:
        ensure_cluster(clients(Wire(answer), tmp_path), AzureSection().compute, {}, lambda *_: None)
    assert said in str(caught.value)
    assert len(made) == 1
