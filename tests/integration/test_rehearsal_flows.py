"""Prompt flow's own client pushes our flow to the rehearsed workspace and finds it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
from tests.integration.rehearsal_fixture import GROUP, WORKSPACE, Azure

pytest.importorskip("promptflow.azure", reason="the extras `flow` and `azure` are not installed")

from promptflow.azure import PFClient
from promptflow.core._connection_provider._workspace_connection_provider import (
    WorkspaceConnectionProvider,
)

pytest_plugins = (
    "tests.integration.server_plugin",
    "tests.integration.rehearsal_plugin",
)
FLOW = Path(__file__).parents[2] / "flows" / "phi3_chat"


def test_the_flow_is_pushed_and_found(azure: Azure) -> None:
    client = PFClient(azure.credential, azure.subscription, GROUP, WORKSPACE)
    pushed = client.flows.create_or_update(FLOW, display_name="phi3 chat", type="chat")
    assert client.flows.get(pushed.name).display_name == "phi3 chat"
    assert [flow.name for flow in client.flows.list()] == [pushed.name]
    share = next((azure.rehearsal.folder / "shares" / "sttests").iterdir())
    uploaded = (share / pushed.path).parent
    assert (uploaded / "integrate_with_promptflow.py").is_file()
    assert (uploaded / "phi3_tool" / "client.py").is_file()


def test_a_flow_without_its_files_is_refused(azure: Azure) -> None:
    token = azure.credential.get_token("https://management.azure.com/.default").token
    answer = requests.post(
        f"https://eastus.api.azureml.ms/flow/api{azure.workspace}/Flows",
        json={"flowName": "none", "flowDefinitionFilePath": "Users/nobody/flow.dag.yaml"},
        headers={"Authorization": f"Bearer {token}"},
        timeout=30,
    )
    assert answer.status_code == 400
    assert "was not found in the file share" in answer.text


def connection(**changes: Any) -> dict[str, Any]:
    """The body of a custom connection as Prompt flow reads it."""
    kind = {"connection_type": "Custom", "module": "promptflow.connections"}
    properties = {
        "authType": "CustomKeys",
        "category": "CustomKeys",
        "target": "_",
        "credentials": {"keys": {"key": "a-key-of-tests"}},
        "metadata": {
            "endpoint": "https://e.eastus.inference.ml.azure.com/score",
            **{f"azureml.flow.{name}": value for name, value in kind.items()},
        },
    }
    return {"properties": {**properties, **changes}}


def test_promptflow_reads_a_custom_connection(azure: Azure) -> None:
    path = f"{azure.workspace}/connections/phi3_connection"
    assert azure.call("PUT", path, connection()).status_code == 200
    assert "a-key-of-tests" not in azure.call("GET", path).text
    provider = WorkspaceConnectionProvider(
        azure.subscription, GROUP, WORKSPACE, credential=azure.credential
    )
    found = provider.get("phi3_connection")
    assert found.secrets["key"] == "a-key-of-tests"
    assert found.configs["endpoint"].endswith("/score")
    assert "azureml.flow.module" not in found.configs
    assert azure.call("DELETE", path).status_code == 200


@pytest.mark.parametrize(
    "changes",
    [
        {"authType": "Magic"},
        {"target": ""},
        {"credentials": {}},
        {"credentials": {"keys": {"key": 5}}},
        {"metadata": {"endpoint": 5}},
    ],
)
def test_a_connection_that_is_none_is_refused(azure: Azure, changes: dict[str, Any]) -> None:
    path = f"{azure.workspace}/connections/phi3_broken"
    assert azure.call("PUT", path, connection(**changes)).status_code == 400
    assert azure.call("GET", path).status_code == 404
