"""Connections by REST: the exact ARM bodies, what is read back, and whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phi3_training.errors import StageError
from phi3_training.targets import Access
from phi3_training.targets.azure.prompt_flow import (
    connection_body,
    connection_url,
    delete_connection,
    read_connection,
    write_connection,
)

from .azure_wire import SUBSCRIPTION, Answer, Wire, clients

URL = "https://ep.eastus.inference.ml.azure.com/score"
PATH = (
    f"https://management.azure.com/subscriptions/{SUBSCRIPTION}/resourceGroups/phi3-promptflow"
    "/providers/Microsoft.MachineLearningServices/workspaces/ws/connections/phi3_connection"
)
VERSION = "?api-version=2024-04-01"
METADATA = {
    "endpoint": URL,
    "written_by": "phi3-promptflow",
    "azureml.flow.connection_type": "Custom",
    "azureml.flow.module": "promptflow.connections",
}


class Workspace:
    """One connection, as ARM keeps it; `stubborn` forgets what is put."""

    def __init__(self, held: dict[str, Any] | None = None, *, stubborn: bool = False) -> None:
        self.held = held
        self.stubborn = stubborn
        self.wire = Wire(self._answer)

    def _answer(self, method: str, _url: str) -> Answer:
        if method == "PUT":
            if not self.stubborn:
                self.held = self.wire.sent[-1][2]
            return 200, self.held or {}
        if method == "DELETE":
            self.held = None
            return 200, {}
        if self.held is None:
            return 404, {"error": {"code": "UserError", "message": "no such connection"}}
        return 200, self.held


def test_the_exact_body_with_a_key(tmp_path: Path) -> None:
    place = Workspace()

    made = write_connection(
        clients(place.wire, tmp_path), "ws", "phi3_connection", Access(URL, key="the-key")
    )

    assert made == "created"
    assert [(method, url) for method, url, _ in place.wire.sent] == [
        ("POST", f"{PATH}/listsecrets{VERSION}"),
        ("PUT", f"{PATH}{VERSION}"),
        ("POST", f"{PATH}/listsecrets{VERSION}"),
    ]
    assert place.wire.sent[1][2] == {
        "properties": {
            "authType": "CustomKeys",
            "category": "CustomKeys",
            "target": "_",
            "isSharedToAll": False,
            "credentials": {"keys": {"key": "the-key"}},
            "metadata": METADATA,
        }
    }


def test_with_entra_sign_in_no_secret_is_sent() -> None:
    properties = connection_body(Access(URL, token_provider=lambda: "never-asked"))["properties"]

    assert properties["credentials"] == {"keys": {"auth": "entra"}}
    assert properties["metadata"] == METADATA


def test_the_same_connection_is_not_written_again(tmp_path: Path) -> None:
    access = Access(URL, key="the-key")
    place = Workspace(connection_body(access))

    assert write_connection(clients(place.wire, tmp_path), "ws", "c_1", access) == "exists"
    assert [method for method, _, _ in place.wire.sent] == ["POST"]


def test_a_new_key_replaces_the_old_one(tmp_path: Path) -> None:
    place = Workspace(connection_body(Access(URL, key="old-key")))

    made = write_connection(clients(place.wire, tmp_path), "ws", "c_1", Access(URL, key="new-key"))

    assert made == "changed"
    assert place.held == connection_body(Access(URL, key="new-key"))


def test_somebody_elses_connection_stays(tmp_path: Path) -> None:
    theirs = connection_body(Access(URL, key="theirs"))
    del theirs["properties"]["metadata"]["written_by"]
    place = Workspace(theirs)

    with pytest.raises(StageError, match="that phi3 did not write") as refused:
        write_connection(clients(place.wire, tmp_path), "ws", "c_1", Access(URL, key="ours"))

    assert "theirs" not in str(refused.value)
    assert delete_connection(clients(place.wire, tmp_path), "ws", "c_1", {"ep"}) is False
    assert {method for method, _, _ in place.wire.sent} == {"POST"}


def test_what_is_read_back_must_be_what_was_written(tmp_path: Path) -> None:
    place = Workspace(connection_body(Access(URL, key="old-key")), stubborn=True)

    with pytest.raises(StageError, match="differs from what was written") as refused:
        write_connection(clients(place.wire, tmp_path), "ws", "c_1", Access(URL, key="new-key"))

    assert "key" not in str(refused.value).split("connection")[0]


def test_deleting_ours(tmp_path: Path) -> None:
    place = Workspace(connection_body(Access(URL, key="k")))
    made = clients(place.wire, tmp_path)

    assert delete_connection(made, "ws", "c_1", {"another"}) is False
    assert connection_url(made, "ws", "c_1") == URL
    assert delete_connection(made, "ws", "c_1", {"another", "ep"}) is True
    assert delete_connection(made, "ws", "c_1", {"ep"}) is False
    assert connection_url(made, "ws", "c_1") == ""
    assert read_connection(made, "ws", "c_1") is None


def test_a_refusal_quotes_no_key(tmp_path: Path) -> None:
    def refuse(method: str, _url: str) -> Answer:
        if method == "POST":
            return 404, {"error": {"code": "UserError", "message": "none"}}
        return 403, {"error": {"code": "AuthorizationFailed", "message": "key=the-key-itself no"}}

    with pytest.raises(StageError, match="AuthorizationFailed") as refused:
        write_connection(
            clients(Wire(refuse), tmp_path), "ws", "c_1", Access(URL, key="the-key-itself")
        )

    assert "the-key-itself" not in str(refused.value)
