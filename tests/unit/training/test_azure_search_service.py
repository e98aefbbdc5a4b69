"""A search service of a run's own: what ARM is asked for, what it costs, and its end."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from .azure_wire import SUBSCRIPTION, Token, Wire, clients, place

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.credentials import AccessToken
from tests.integration.stub_endpoint import Reply, StubEndpoint

from phi3_tool.azure_search import SearchService
from phi3_training.errors import StageError, UsageError
from phi3_training.progress import no_progress
from phi3_training.recipe.azure import AzureSection
from phi3_training.targets.azure.search_service import (
    Wanted,
    ensure_service,
    plan,
    remove_service,
    usd_per_hour,
)

from .search_service import KEY, SearchServiceStub

NAME = "phi3-documents-1a2b3c4d"
ENDLESS = Wanted(NAME, deadline="none")  # its deadline: test_azure_search_deadline.py
OURS = {"created-by": "phi3-promptflow"}


class Arm:
    """Answers like ARM: what was PUT is there afterwards, what was deleted is gone."""

    def __init__(self) -> None:
        self.there: dict[str, dict[str, Any]] = {}
        self.wire = Wire(self.answer)

    def answer(self, method: str, url: str) -> tuple[int, dict[str, Any]]:
        path = url.split("?")[0]
        if method == "PUT":
            body = self.wire.sent[-1][2]
            properties = {**body.get("properties", {}), "provisioningState": "succeeded"}
            self.there[path] = {"id": path, "name": path.rsplit("/", 1)[-1], **body,
                                "properties": properties}  # fmt: skip
            return 201, self.there[path]
        if method == "DELETE":
            return (200, {}) if self.there.pop(path, None) else (204, {})
        if path in self.there:
            return 200, self.there[path]
        return 404, {"error": {"code": "ResourceNotFound", "message": "none"}}

    def bodies(self, part: str) -> list[Any]:
        return [body for method, url, body in self.wire.sent if method == "PUT" and part in url]


class Signed(Token):
    """A sign-in whose token says who it is, as Entra's does."""

    def __init__(self, **claims: str) -> None:
        payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
        self._token = f"e30.{payload}.x"

    def get_token(self, *_scopes: str, **_options: Any) -> AccessToken:
        return AccessToken(self._token, 2**31)


@pytest.fixture
def arm(tmp_path: Path) -> tuple[Arm, Any]:
    made = Arm()
    signed_in = clients(made.wire, tmp_path)
    signed_in.credential = Signed(oid="11111111-2222-3333-4444-555555555555")
    return made, signed_in


def test_created_without_keys_and_open_to_whoever_signed_in(arm: tuple[Arm, Any]) -> None:
    made, signed_in = arm
    with SearchServiceStub() as stub:
        stub.trouble = lambda _method, path: (
            (200, {"value": []}, {}) if path == "/indexes" else None
        )
        service = SearchService(stub.endpoint, key=KEY)
        told = ensure_service(signed_in, ENDLESS, AzureSection(), no_progress, service=service)
    assert told.startswith("no deadline (rag.search.deadline=none): it bills until")
    (body,) = made.bodies("/searchServices/" + NAME + "?")
    assert body["sku"] == {"name": "basic"}
    assert body["properties"]["disableLocalAuth"] is True
    assert body["tags"] == OURS
    roles = made.bodies("/roleAssignments/")
    assert {role["properties"]["principalType"] for role in roles} == {"User"}
    ids = sorted(role["properties"]["roleDefinitionId"].rsplit("/", 1)[-1] for role in roles)
    assert ids == ["7ca78c08-252a-4471-8644-bb5ff32d4ba0", "8ebe5a00-799e-43f5-93ac-243d3dce84a7"]


def test_a_new_role_is_waited_for(arm: tuple[Arm, Any]) -> None:
    _, signed_in = arm
    waited: list[float] = []
    answers = iter([(403, {"error": {"message": "no"}}, {})] * 2)
    with SearchServiceStub() as stub:
        stub.trouble = lambda _method, _path: next(answers, (200, {"value": []}, {}))
        service = SearchService(stub.endpoint, key=KEY)
        ensure_service(
            signed_in, ENDLESS, AzureSection(), no_progress, service=service,
            sleep=waited.append,
        )  # fmt: skip
    assert waited == [10.0, 10.0]


def test_a_second_time_nothing_is_created(arm: tuple[Arm, Any]) -> None:
    made, signed_in = arm
    with SearchServiceStub() as stub:
        stub.trouble = lambda _method, _path: (200, {"value": []}, {})
        service = SearchService(stub.endpoint, key=KEY)
        for _ in range(2):
            ensure_service(signed_in, ENDLESS, AzureSection(), no_progress, service=service)
    assert len(made.bodies("/searchServices/")) == 3  # itself and two roles


def test_a_sign_in_that_does_not_say_who_it_is(arm: tuple[Arm, Any]) -> None:
    _, signed_in = arm
    signed_in.credential = Token()
    with pytest.raises(StageError, match=r"az login.*rag\.search\.endpoint"):
        ensure_service(signed_in, ENDLESS, AzureSection(), no_progress)


def service_id(arm: Arm, folder: Path, tags: dict[str, str]) -> str:
    found = Wanted(NAME).id(place(folder))
    arm.there[f"https://management.azure.com{found}"] = {"id": found, "name": NAME, "tags": tags}
    return found


def removed(arm: tuple[Arm, Any], folder: Path, tags: dict[str, str], indexes: list[str]) -> str:
    made, signed_in = arm
    with SearchServiceStub() as stub:
        listed = {"value": [{"name": name} for name in indexes]}
        stub.trouble = lambda _method, _path: (200, listed, {})
        service = SearchService(stub.endpoint, key=KEY)
        found = service_id(made, folder, tags)
        return remove_service(signed_in, found, no_progress, ours=NAME, service=service)


def test_the_end(arm: tuple[Arm, Any], tmp_path: Path) -> None:
    assert removed(arm, tmp_path, OURS, [NAME]) == f"Deleted the search service {NAME}"
    assert not [path for path in arm[0].there if "searchServices" in path]
    again = remove_service(arm[1], Wanted(NAME).id(place(tmp_path)), no_progress, ours=NAME)
    assert again.startswith("Was deleted before")


@pytest.mark.parametrize(
    ("tags", "indexes", "said"),
    [({}, [NAME], "not made by phi3"), (OURS, [NAME, "hotels"], "other indexes.*hotels")],
)
def test_what_is_left_alone(
    arm: tuple[Arm, Any], tmp_path: Path, tags: dict[str, str], indexes: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        removed(arm, tmp_path, tags, indexes)
    assert "DELETE" not in {method for method, _, _ in arm[0].wire.sent}


def prices(*rows: tuple[str, float, str]) -> Reply:
    items = [
        {"skuName": sku, "retailPrice": price, "unitOfMeasure": unit, "currencyCode": "USD"}
        for sku, price, unit in rows
    ]
    return Reply(body=json.dumps({"Items": items}).encode())


def test_the_price_of_the_region(tmp_path: Path) -> None:
    listed = prices(
        ("Basic", 0.1, "1 Hour"), ("Basic", 7.0, "1/Month"), ("Standard S1", 0.3, "1 Hour")
    )
    with StubEndpoint(listed) as stub:
        assert usd_per_hour("basic", "westeurope", url=stub.url()) == 0.1
        assert usd_per_hour("standard", "westeurope", url=stub.url()) == 0.3
        lines = plan(Wanted(NAME), place(tmp_path, location="westeurope"), prices=stub.url())
    assert "westeurope" in stub.seen[0].path
    text = "\n".join(line.text for line in lines)
    assert "0.100 USD per hour, 73 per month" in text
    assert "by itself after 7d (rag.search.deadline), at most 16.80 USD" in text
    assert "phi3 rag down" in text


@pytest.mark.parametrize(
    "reply",
    [
        Reply(500, b""),
        Reply(body=b"no JSON"),
        prices(),
        prices(("Basic", 0.1, "1 Hour"), ("Basic", 0.2, "1 Hour")),
    ],
)
def test_no_price_rather_than_a_wrong_one(tmp_path: Path, reply: Reply) -> None:
    with StubEndpoint(reply) as stub:
        lines = plan(Wanted(NAME), place(tmp_path), prices=stub.url())
    assert "unknown: see https://azure.microsoft.com/pricing/details/search/" in lines[2].text


def test_where_it_is(tmp_path: Path) -> None:
    assert Wanted(NAME).id(place(tmp_path)) == (
        f"/subscriptions/{SUBSCRIPTION}/resourceGroups/phi3-promptflow/providers/"
        f"Microsoft.Search/searchServices/{NAME}"
    )
