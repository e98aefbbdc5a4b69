"""How the traffic of an endpoint changes: what is sent, what is refused, what is never touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_training.errors import StageError
from phi3_training.manifests import EndpointManifest
from phi3_training.progress import no_progress
from phi3_training.run import Run
from phi3_training.targets.azure.deploy import (
    ServedModel,
    ensure_endpoint,
    free_name,
    what_bills,
)
from phi3_training.targets.azure.place import deployment_name
from phi3_training.targets.azure.status import endpoint_state
from phi3_training.targets.azure.traffic import DeploymentId, Wanted, check_traffic, set_traffic

from .azure_endpoint import BLUE, Service, deployment, refusal, section
from .azure_wire import clients

GREEN = Wanted({"green": 100})
MODEL = ServedModel("phi3", "2", "job")


def test_a_change_sends_the_whole_endpoint_back(tmp_path: Path) -> None:
    service = Service(mirror={"green": 10})

    assert set_traffic(clients(service.wire, tmp_path), section(), "chat", GREEN, no_progress)

    (sent,) = service.puts
    assert service.traffic == {"green": 100}
    assert service.mirror == {}  # live traffic and copies exclude each other
    assert sent["tags"] == {"team": "ours"}
    assert not set_traffic(clients(service.wire, tmp_path), section(), "chat", GREEN, no_progress)


def test_copies_of_requests_stay_where_the_shares_change(tmp_path: Path) -> None:
    service = Service(mirror={"green": 10}, traffic={})

    set_traffic(clients(service.wire, tmp_path), section(), "chat", Wanted(BLUE), no_progress)

    assert service.mirror == {"green": 10}


def test_a_refusal_is_reported_once_with_azures_reason(tmp_path: Path) -> None:
    service = Service([refusal(400, "InvalidTraffic", "green has no healthy instance")] * 9)

    with pytest.raises(StageError, match="green has no healthy instance") as caught:
        set_traffic(clients(service.wire, tmp_path), section(), "chat", GREEN, no_progress)

    assert len(service.puts) == 1
    assert "InvalidTraffic, HTTP 400" in str(caught.value)
    assert "The shares are still: blue 100 %" in str(caught.value)


@pytest.mark.patient
def test_a_conflict_is_waited_for_and_its_reason_kept(tmp_path: Path) -> None:
    busy = refusal(409, "Conflict", "another change is in progress")
    service = Service([busy, busy])
    told: list[str] = []

    def progress(_done: int, _total: int, text: str) -> None:
        told.append(text)

    assert set_traffic(clients(service.wire, tmp_path), section(), "chat", GREEN, progress)

    assert len(service.puts) == 3
    assert any("another change is in progress" in text for text in told)
    with pytest.raises(StageError, match="another change is in progress"):
        set_traffic(
            clients(Service([busy] * 99).wire, tmp_path), section(), "chat", GREEN, no_progress
        )


def test_a_change_that_did_not_happen_is_no_success(tmp_path: Path) -> None:
    service = Service(keeps=True)

    with pytest.raises(StageError, match=r"but did not do it\nThe shares are still: blue"):
        set_traffic(clients(service.wire, tmp_path), section(), "chat", GREEN, no_progress)


def test_a_change_waits_for_the_one_before(tmp_path: Path) -> None:
    service = Service(states=["Updating", "Updating", "Succeeded"])

    assert set_traffic(clients(service.wire, tmp_path), section(), "chat", GREEN, no_progress)


@pytest.mark.parametrize(
    ("shares", "told"),
    [({"gone": 100}, "no deployment gone"), ({"blue": 150, "green": -50}, "add up to 100")],
)
def test_impossible_shares_are_not_sent(shares: dict[str, int], told: str) -> None:
    with pytest.raises(StageError, match=told):
        check_traffic(shares, ["blue", "green"])


def test_a_failed_endpoint_is_repaired_with_its_traffic(tmp_path: Path) -> None:
    service = Service(states=["Failed"])

    ensure_endpoint(
        clients(service.wire, tmp_path), section(), Run.open(tmp_path / "run"), "chat", no_progress
    )

    assert len(service.puts) == 1
    assert service.traffic == BLUE
    assert service.tags == {"team": "ours"}


def test_a_name_in_the_recipe_is_a_prefix() -> None:
    one, two = (
        deployment_name(section(endpoint={"deployment": "blue"}), "phi3", v) for v in ("1", "2")
    )

    assert one.startswith("blue-v1-")
    assert two.startswith("blue-v2-")
    long = section(endpoint={"deployment": "a-name-of-exactly-32-characters-"[:31] + "x"})
    names = {deployment_name(long, "phi3", version) for version in ("1", "2")}
    assert len(names) == 2
    assert {len(name) <= 32 for name in names} == {True}


@pytest.mark.parametrize(
    ("version", "state", "live", "free"),
    [
        ("2", "Succeeded", True, ""),  # it serves this version already
        ("1", "Succeeded", True, "-2"),  # live: never overwritten
        ("1", "Succeeded", False, "-2"),  # kept: a rollback goes to it
        ("2", "Failed", True, "-2"),
        ("2", "Failed", False, ""),  # replaced: nobody loses anything
    ],
)
def test_what_is_live_or_kept_is_never_replaced(
    tmp_path: Path, version: str, state: str, live: bool, free: str
) -> None:
    name = deployment_name(section(), "phi3", "2")
    service = Service(traffic={name: 100} if live else dict(BLUE))
    service.deployments[name] = deployment(name, version, state)
    known = clients(service.wire, tmp_path)
    endpoint = known.ml.online_endpoints.get("chat")

    found = free_name(known, section(), endpoint, MODEL, endpoint.traffic)

    assert found == name + free


def test_what_is_up_without_traffic_is_named_with_its_size(tmp_path: Path) -> None:
    told = what_bills(section(), Run.open(tmp_path / "my-run"), DeploymentId("chat", "green"))

    assert "green of chat (1 x Standard_NC24ads_A100_v4)" in told
    assert "bills until it is deleted: phi3 down --on azure --idle --run my-run" in told


@pytest.mark.parametrize(("state", "is_up"), [("Succeeded", True), ("Deleting", False)])
def test_an_endpoint_that_is_being_deleted_is_not_up(
    tmp_path: Path, state: str, is_up: bool
) -> None:
    service, run = Service(states=[state]), Run.open(tmp_path / "run")
    run.write(EndpointManifest(endpoint="https://x/score", endpoint_name="chat", deployment="blue"))

    found = endpoint_state(clients(service.wire, tmp_path), run)

    assert (found.state == "up") is is_up
