"""Role assignments: the exact ARM bodies, names that repeat, what least privilege leaves out."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from phi3_training.errors import StageError
from phi3_training.targets.azure.resources import (
    ROLES,
    SECRETS_READER,
    Dependents,
    Grant,
    ensure_grant,
    grants,
)

from .azure_wire import SUBSCRIPTION, Answer, Wire, clients

GROUP = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/rg"
STORAGE = f"{GROUP}/providers/Microsoft.Storage/storageAccounts/st"
REGISTRY = f"{GROUP}/providers/Microsoft.ContainerRegistry/registries/cr"
WORKSPACE = f"{GROUP}/providers/Microsoft.MachineLearningServices/workspaces/ws"
PRINCIPAL = "99999999-0000-4000-8000-000000000001"


def _wanted(*, least_privilege: bool) -> list[Grant]:
    return grants(
        PRINCIPAL,
        Dependents(STORAGE, "kv", None, REGISTRY),
        group=GROUP,
        connections=[WORKSPACE],
        least_privilege=least_privilege,
    )


def _absent(method: str, _url: str) -> Answer:
    if method == "GET":
        return 404, {"error": {"code": "RoleAssignmentNotFound", "message": "none"}}
    return 201, {"id": "x", "name": "y", "properties": {}}


def test_the_exact_bodies_of_the_tutorials_roles(tmp_path: Path) -> None:
    wire = Wire(_absent)
    made = clients(wire, tmp_path)
    wanted = _wanted(least_privilege=False)
    assert [ensure_grant(made, item) for item in wanted] == ["created"] * 4
    puts = [(url, body) for method, url, body in wire.sent if method == "PUT"]
    definition = f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Authorization/roleDefinitions/"
    expected = [
        (GROUP, "b24988ac-6180-42a0-ab88-20f7382dd24c"),
        (STORAGE, "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1"),
        (REGISTRY, "7f951dda-4ed3-4680-a7ca-43fe172d538d"),
        (WORKSPACE, "ea01e6af-a1c1-4350-9563-ad00f8c72ec5"),
    ]
    assert [body for _url, body in puts] == [
        {
            "properties": {
                "roleDefinitionId": definition + role,
                "principalId": PRINCIPAL,
                "principalType": "ServicePrincipal",
            }
        }
        for _scope, role in expected
    ]
    for (url, _body), (scope, _role), item in zip(puts, expected, wanted, strict=True):
        address = f"https://management.azure.com{scope}/providers/Microsoft.Authorization"
        assert url == f"{address}/roleAssignments/{item.name}?api-version=2022-04-01"
        assert uuid.UUID(item.name)


def test_least_privilege_is_all_but_contributor_on_the_group() -> None:
    narrow = [(item.role, item.scope) for item in _wanted(least_privilege=True)]
    assert narrow == [
        ("Storage Blob Data Reader", STORAGE),
        ("AcrPull", REGISTRY),
        (SECRETS_READER, WORKSPACE),
    ]


def test_a_name_repeats_and_hangs_on_scope_role_and_identity() -> None:
    item = Grant("AcrPull", REGISTRY, PRINCIPAL)
    assert item.name == Grant("AcrPull", REGISTRY.upper(), PRINCIPAL).name
    others = [
        Grant("Contributor", REGISTRY, PRINCIPAL),
        Grant("AcrPull", STORAGE, PRINCIPAL),
        Grant("AcrPull", REGISTRY, PRINCIPAL[:-1] + "2"),
    ]
    assert len({item.name, *(other.name for other in others)}) == 4
    assert len(set(ROLES.values())) == len(ROLES)


def test_one_that_is_there_under_another_name_is_fine(tmp_path: Path) -> None:
    def answer(method: str, url: str) -> Answer:
        if method == "GET":
            return _absent(method, url)
        return 409, {"error": {"code": "RoleAssignmentExists", "message": "there already"}}

    assert (
        ensure_grant(clients(Wire(answer), tmp_path), _wanted(least_privilege=True)[0]) == "exists"
    )


def test_an_identity_that_is_too_new_is_tried_again(tmp_path: Path) -> None:
    left = [2]

    def answer(method: str, url: str) -> Answer:
        if method == "PUT" and left[0]:
            left[0] -= 1
            return 400, {"error": {"code": "PrincipalNotFound", "message": "not there yet"}}
        return _absent(method, url)

    assert (
        ensure_grant(clients(Wire(answer), tmp_path), _wanted(least_privilege=True)[0]) == "created"
    )


def test_a_missing_right_says_whom_to_ask(tmp_path: Path) -> None:
    def answer(method: str, url: str) -> Answer:
        if method == "GET":
            return _absent(method, url)
        return 403, {"error": {"code": "AuthorizationFailed", "message": "no right"}}

    wire = Wire(answer)
    with pytest.raises(StageError, match="User Access Administrator"):
        ensure_grant(clients(wire, tmp_path), _wanted(least_privilege=True)[0])
    assert [method for method, _url, _body in wire.sent] == ["GET", "PUT"]  # not tried again
