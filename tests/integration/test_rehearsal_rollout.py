"""A client that asks all the time gets every answer, whatever happens to a rollout.

One endpoint of the rehearsed Azure with two deployments of the taught model; the product's own
rollout between them, disturbed. Each test leaves blue with all the traffic.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.asking import Asking
from tests.integration.rehearsal_fixture import A100, GROUP, REGION, WORKSPACE, Azure
from tests.integration.server_fixture import PAIRS

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from phi3_rehearsal.faults import Faults
from phi3_training.doctor import unfinished_rollouts
from phi3_training.errors import StageError
from phi3_training.evaluate.questions import Question
from phi3_training.evaluate.rows import Answered, Said, make_rows, write_rows
from phi3_training.manifests import EndpointManifest, PlaceManifest, RolloutManifest
from phi3_training.progress import no_progress
from phi3_training.recipe import Recipe, save_recipe
from phi3_training.run import RECIPE_FILE, Run
from phi3_training.runs import remarks
from phi3_training.targets.azure.clients import Clients
from phi3_training.targets.azure.deploy import access_to
from phi3_training.targets.azure.place import find_place
from phi3_training.targets.azure.rollback import roll_back, set_shares, traffic_of
from phi3_training.targets.azure.rollout import Rollout
from phi3_training.targets.azure.status import plan, take_inventory
from phi3_training.targets.azure.target import AzureTarget
from phi3_training.targets.azure.traffic import DeploymentId, Wanted, set_traffic

pytest_plugins = (
    "tests.integration.server_plugin",
    "tests.integration.rehearsal_plugin",
)
EP = "chat-rollout"
RECIPE = {
    "name": "r",
    "data": {"train": ["chats.jsonl"]},
    "model": {"name_or_path": "microsoft/Phi-4-mini-instruct"},
    "evaluate": {"max_new_tokens": 24},
}
BLUE = {"blue": 100}
MODEL = "azureml://registries/azureml/models/Phi-4-mini-instruct/versions/1"


class Stand:
    """What the tests share: a run, its clients, and the endpoint with both deployments."""

    def __init__(self, azure: Azure, folder: Path) -> None:
        self.azure = azure
        content = self.settings()
        self.recipe = Recipe.model_validate({**RECIPE, "azure": content})
        place = find_place(self.recipe.azure, {}, folder)
        self.clients = Clients(place, self.recipe.azure.poll, azure.credential)
        self.run = Run.open(folder / "my-run")
        save_recipe(self.recipe, self.run.file(RECIPE_FILE))
        names = ("subscription_id", "resource_group", "workspace_name", "location")
        self.run.write(PlaceManifest(target="azure", **{n: content[n] for n in names}))
        asked = [
            Question("validation", i, [{"role": "user", "content": q}], a)
            for i, (q, a) in enumerate(PAIRS[:20])
        ]
        said = [Answered(Said(q.expected), None) for q in asked]
        write_rows(self.run, make_rows(asked, said, said))
        for name in ("", "/deployments/blue", "/deployments/green"):
            self._make(name)
        set_traffic(self.clients, self.recipe.azure, EP, Wanted(BLUE), no_progress)
        self.access = access_to(self.clients, EP)
        manifest = EndpointManifest(
            target="azure", endpoint=self.access.endpoint, endpoint_name=EP, deployment="blue"
        )
        self.run.write(manifest)

    def settings(self, **rollout: Any) -> dict[str, Any]:
        """The recipe's section `azure`."""
        return {
            "subscription_id": self.azure.subscription,
            "resource_group": GROUP,
            "workspace_name": WORKSPACE,
            "location": REGION,
            "endpoint": {"name": EP},
            "poll": {"interval": 0.1, "retry_backoff_factor": 0.05},
            "rollout": {"minutes": 0, "max_p95_ratio": 50, **rollout},
        }

    def _make(self, name: str) -> None:
        # The SDK reads the empty inner properties, which it always sends itself.
        properties: dict[str, Any] = {"authMode": "Key", "properties": {}}
        if name:
            properties = {"model": MODEL, "instanceType": A100, "properties": {}}
        body = {"location": REGION, "sku": {"name": "Default"}, "properties": properties}
        path = f"{self.azure.workspace}/onlineEndpoints/{EP}{name}"
        assert self.azure.call("PUT", path, body).status_code == 201
        ends = time.monotonic() + 240
        while self.azure.call("GET", path).json()["properties"]["provisioningState"] != "Succeeded":
            assert time.monotonic() < ends
            time.sleep(0.1)

    def rollout(self) -> Rollout:
        return Rollout(
            self.clients,
            self.recipe,
            self.run,
            DeploymentId(EP, "green"),
            self.shares(),
            self.access,
            no_progress,
            "green bills",
        )

    def shares(self) -> dict[str, int]:
        held = traffic_of(self.clients, self.run).deployments
        return {item.name: item.share for item in held if item.share}

    def is_up(self) -> bool:
        return AzureTarget(self.clients).is_up(self.recipe, self.run)

    def record(self) -> RolloutManifest:
        return self.run.require(RolloutManifest)


@pytest.fixture(scope="module")
def stand(azure: Azure, tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(azure, tmp_path_factory.mktemp("rollout"))


@pytest.fixture(autouse=True)
def blue_serves(stand: Stand) -> Iterator[None]:
    yield
    Faults(stand.azure.rehearsal.folder / "faults.json").clear()
    assert stand.shares() == BLUE


@pytest.mark.parametrize(
    "form",
    [
        "empty",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("nothing", "none", "garbled")),
        "error",
        "parrot",
    ],
)
def test_bad_answers_never_get_traffic(stand: Stand, form: str) -> None:
    stand.azure.rehearsal.fault(f"POST */{EP}/deployments/green {form} times=999")

    with Asking(stand.access) as client, pytest.raises(StageError) as caught:
        stand.rollout().go()

    assert "is worse than blue, with 0 % of the traffic" in str(caught.value)
    assert "the red lamp" in str(caught.value) or form == "parrot"
    assert client.failures == []
    assert len(set(client.answers)) == 1
    assert stand.record().state == "undone"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (f"POST */{EP}/deployments/green error times=999 share=25", "with 25 % of the traffic"),
        (f"POST */{EP}/deployments/green parrot times=999 share=100", "with 100 % of the traffic"),
        (f"PUT */onlineEndpoints/{EP} 400 code=NoRoom message=full", "NoRoom, HTTP 400): full"),
        (f"PUT */onlineEndpoints/{EP} failed code=NoRoom message=full", "full"),
    ],
)
def test_what_breaks_on_the_way_is_undone(stand: Stand, fault: str, told: str) -> None:
    """Of HTTP's statuses none is an error; a bad body may have reached somebody at its step."""
    stand.azure.rehearsal.fault(fault)
    answered_badly = "share=" in fault

    with Asking(stand.access) as client, pytest.raises(StageError) as caught:
        stand.rollout().go()

    assert told in str(caught.value)
    assert "as before, read back from Azure: blue 100 %" in str(caught.value)
    assert answered_badly or client.failures == []
    assert all("status 200" in failure for failure in client.failures)
    assert client.answers


@pytest.mark.slow
def test_through_faults_of_the_service_it_gets_there_and_back(stand: Stand) -> None:
    for fault in (
        f"PUT */onlineEndpoints/{EP} 409 times=2",
        f"PUT */onlineEndpoints/{EP} reset-after",
        f"GET */onlineEndpoints/{EP} 503",
        "GET */operationsStatus/* lost",
    ):
        stand.azure.rehearsal.fault(fault)

    with Asking(stand.access) as client:
        work = stand.rollout()
        work.go()
        assert stand.shares() == {"green": 100}
        assert stand.record().state == "done"
        found = roll_back(stand.clients, stand.recipe.azure, stand.run, no_progress)

    assert client.failures == []
    assert "endpoint chat-rollout: blue 100 %" in found.lines(stand.run)
    assert len(work.lines) == 4
    served = stand.run.require(EndpointManifest)
    assert (served.deployment, served.traffic) == ("blue", BLUE)
    assert stand.is_up()


@pytest.mark.slow
def test_copies_of_requests_reach_the_new_one_first(stand: Stand) -> None:
    ml, work = stand.clients.ml.online_endpoints, stand.rollout()
    work.recipe = Recipe.model_validate(
        {**work.recipe.model_dump(), "azure": stand.settings(mirror=50)}
    )
    seen: list[dict[str, int]] = []
    work.progress = lambda *_: seen.append(dict(ml.get(EP).mirror_traffic))
    stand.azure.rehearsal.fault(f"POST */{EP}/deployments/green empty times=999 share=5")

    with Asking(stand.access), pytest.raises(StageError, match="with 5 % of the traffic"):
        work.go()

    assert {"green": 50} in seen
    assert not ml.get(EP).mirror_traffic
    refused = Wanted(BLUE, mirror={"green": 60})
    with pytest.raises(StageError, match="At most 50 %"):
        set_traffic(stand.clients, stand.recipe.azure, EP, refused, no_progress)


def test_a_client_killed_at_a_step_is_seen_and_undone(stand: Stand) -> None:
    begun = RolloutManifest(
        endpoint_name=EP, deployment="green", before=BLUE, share=5, started="2026-11-29"
    )
    stand.run.write(begun)
    half = Wanted({"blue": 95, "green": 5}, tags={"phi3_rollout": "to green from blue=100 since t"})
    set_traffic(stand.clients, stand.recipe.azure, EP, half, no_progress)

    found = traffic_of(stand.clients, stand.run)

    assert not stand.is_up()
    (seen,) = unfinished_rollouts([stand.run])
    assert "not finished: it was last given 5 % of the traffic (before: blue 100 %)" in seen.said
    assert remarks(stand.run)[0].startswith(seen.said)
    lines = [line for each in take_inventory(stand.clients).endpoints for line in each.lines()]
    assert "  unfinished rollout to green from blue=100 since t" in lines
    assert any("undo it with: phi3 azure rollback" in line for line in found.lines(stand.run))
    with Asking(stand.access) as client:
        roll_back(stand.clients, stand.recipe.azure, stand.run, no_progress)
    assert client.failures == []
    assert stand.is_up()
    assert list(unfinished_rollouts([stand.run])) == []


def test_shares_by_hand_go_to_what_answers(stand: Stand) -> None:
    section = stand.recipe.azure
    stand.azure.rehearsal.fault(f"POST */{EP}/deployments/green empty times=1")
    with pytest.raises(StageError, match=r"green: an empty answer.*set green=100 --force"):
        set_shares(stand.clients, section, stand.run, {"green": 100}, no_progress)

    found = set_shares(stand.clients, section, stand.run, {"green": 60, "blue": 40}, no_progress)

    assert stand.shares() == {"green": 60, "blue": 40}
    assert "go back with: phi3 azure rollback --run my-run" in found.lines(stand.run)[-1]
    roll_back(stand.clients, section, stand.run, no_progress)
    with pytest.raises(StageError, match="no deployment grey"):
        set_shares(stand.clients, section, stand.run, {"grey": 100}, no_progress)


def test_the_plan_says_what_a_rollout_takes(stand: Stand) -> None:
    """And what a search service costs that phi3 has made there."""
    tags = {"created-by": "phi3-promptflow"}
    service = f"{stand.azure.group}/providers/Microsoft.Search/searchServices/phi3-docs"
    body = {"location": REGION, "tags": tags, "sku": {"name": "basic"}, "properties": {}}
    assert stand.azure.call("PUT", service, body).status_code == 201

    lines = [line.text for line in plan(stand.clients, stand.recipe, stand.run)]

    assert any("in steps of 5, 25, 100 %, each watched for 0 minutes" in line for line in lines)
    assert any("needs 24 cores" in line and "besides the 48" in line for line in lines)
    assert any(line.startswith("rollout: both deployments bill") for line in lines)
    assert any("the old one, kept for a rollback, for 24h more" in line for line in lines)
    assert any(line.startswith("Azure AI Search phi3-docs: basic; ") for line in lines)
    assert stand.azure.call("DELETE", service).status_code == 200
    json.dumps(traffic_of(stand.clients, stand.run).as_json())
